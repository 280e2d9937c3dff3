# Hypernetes: build, try, test. Every target works on a fresh Debian 12 machine
# with Go and root; what is missing from Debian is installed by `make deps`.
SHELL := /bin/bash
.DEFAULT_GOAL := build
.DELETE_ON_ERROR:

BIN := $(CURDIR)/bin
NAME ?= default
NODES ?= 2
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

# Upstream programs, unmodified, at the versions of upstream/*/go.mod. A program
# is built again when its go.mod changes.
KUBE_VERSION := $(shell awk '$$1=="require" && $$2=="k8s.io/kubernetes" {print $$3} $$1=="k8s.io/kubernetes" && $$2 ~ /^v/ {print $$2}' upstream/kubernetes/go.mod | head -1)
CONTAINERD_VERSION := $(shell awk '$$1=="github.com/containerd/containerd/v2" {print $$2}' upstream/containerd/go.mod)
KUBE_LDFLAGS := -s -w -X k8s.io/component-base/version.gitVersion=$(KUBE_VERSION) -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=$(word 2,$(subst ., ,$(KUBE_VERSION))) -X k8s.io/component-base/version.gitTreeState=clean
KUBE := kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl
CONTAINERD := containerd containerd-shim-runc-v2 ctr
CNI := main/ptp main/bridge main/loopback ipam/host-local meta/portmap
UPSTREAM := etcd $(KUBE) agnhost $(CONTAINERD) runsc containerd-shim-runsc-v1 runc helm metrics-server $(addprefix cni/,$(notdir $(CNI)))
E2E := e2e.test ginkgo nnp
OURS := h8s h8s-controller h8s-node h8s-cni
IMAGES := pause busybox agnhost h8s

PACKAGES := gcc libc6-dev libseccomp-dev pkg-config nftables iproute2 kmod procps util-linux mount busybox-static conntrack ca-certificates \
	qemu-system-x86 qemu-utils erofs-utils binutils dpkg-dev libcap-dev python3
# OpenStack's identity service, for `h8s up --keystone` and the tests.
KEYSTONE := python3-keystone uwsgi-core uwsgi-plugin-python3

# What our programs are made from. VERSION is in them, and therefore in a file that
# changes with it.
SOURCES := go.mod go.sum $(shell find api cmd deploy/apiserver internal -type f ! -name '*_test.go')
# Debian's package database changes whenever a package does.
DPKG := $(wildcard /var/lib/dpkg/status)

# step NAME COMMAND: shows what runs, and the end of its log if it fails. The command
# may have single quotes in it, but no double ones.
step = @./build/step.sh '$(1)' '$(BIN)/log/$(subst /,-,$(subst $() $(),-,$(1))).log' "$(2)"
gobuild = CGO_ENABLED=0 go build -buildvcs=false -trimpath

# Where the plugin's archive will be found, for krew.
KREW_URI ?= file://$(BIN)/krew/h8s-linux-amd64.tar.gz

.PHONY: build up down test krew keystone test-hyper e2e-hyper e2e-programs bench bench-hyper bench-tenancy lint generate deps upstream ours hyper images clean

build: deps upstream ours hyper images ## everything, into bin/

deps: $(BIN)/.deps ## Debian packages that are not there yet

$(BIN)/.deps: Makefile build/deps.sh $(DPKG)
	@./build/deps.sh '$(BIN)/log/install-packages.log' $(PACKAGES)
	@mkdir -p $(BIN) && touch $@

keystone: $(BIN)/.keystone ## Debian's packages of Keystone, for h8s up --keystone

$(BIN)/.keystone: Makefile build/deps.sh $(DPKG) | $(BIN)/.deps
	@./build/deps.sh '$(BIN)/log/install-keystone.log' $(KEYSTONE)
	@mkdir -p $(BIN) && touch $@

upstream: $(addprefix $(BIN)/,$(UPSTREAM))

$(BIN)/etcd: upstream/etcd/go.mod
	$(call step,build etcd,cd upstream/etcd && $(gobuild) -ldflags '-s -w' -o $@ go.etcd.io/etcd/server/v3)

$(addprefix $(BIN)/,$(KUBE)): $(BIN)/%: upstream/kubernetes/go.mod
	$(call step,build $*,cd upstream/kubernetes && $(gobuild) -ldflags '$(KUBE_LDFLAGS)' -o $@ k8s.io/kubernetes/cmd/$*)

$(BIN)/agnhost: upstream/kubernetes/go.mod
	$(call step,build agnhost,cd upstream/kubernetes && $(gobuild) -ldflags '$(KUBE_LDFLAGS)' -o $@ k8s.io/kubernetes/test/images/agnhost)

# Kubernetes' own end-to-end tests, what runs them in parallel, and the program of one of their images.
e2e-programs: $(addprefix $(BIN)/,$(E2E))

$(BIN)/e2e.test: upstream/kubernetes/go.mod
	$(call step,build e2e.test,cd upstream/kubernetes && CGO_ENABLED=0 go test -c -vet=off -buildvcs=false -trimpath -ldflags '$(KUBE_LDFLAGS)' -o $@ k8s.io/kubernetes/test/e2e)

$(BIN)/ginkgo: upstream/kubernetes/go.mod
	$(call step,build ginkgo,cd upstream/kubernetes && $(gobuild) -ldflags '-s -w' -o $@ github.com/onsi/ginkgo/v2/ginkgo)

$(BIN)/nnp: upstream/kubernetes/go.mod
	$(call step,build nnp,cd upstream/kubernetes && $(gobuild) -ldflags '-s -w' -o $@ k8s.io/kubernetes/test/images/nonewprivs)

$(addprefix $(BIN)/,$(CONTAINERD)): $(BIN)/%: upstream/containerd/go.mod
	$(call step,build $*,cd upstream/containerd && $(gobuild) -ldflags '-s -w -X github.com/containerd/containerd/v2/version.Version=$(CONTAINERD_VERSION)' -o $@ github.com/containerd/containerd/v2/cmd/$*)

# Its own tests of the CRI.
$(BIN)/cri-integration.test: upstream/containerd/go.mod
	$(call step,build cri-integration.test,cd upstream/containerd && CGO_ENABLED=0 go test -c -vet=off -buildvcs=false -trimpath -ldflags '-s -w' -o $@ github.com/containerd/containerd/v2/integration)

# runsc chroots itself without a dynamic loader: it must be static.
$(BIN)/runsc: upstream/gvisor/go.mod
	$(call step,build runsc,cd upstream/gvisor && $(gobuild) -ldflags '-s -w' -o $@ gvisor.dev/gvisor/runsc)

# Ours, around gVisor's shim packages: docs/decisions/0002-gvisor-shim.md.
$(BIN)/containerd-shim-runsc-v1: upstream/gvisor/go.mod $(wildcard upstream/gvisor/shim/*.go)
	$(call step,build containerd-shim-runsc-v1,cd upstream/gvisor && $(gobuild) -ldflags '-s -w' -o $@ ./shim)

$(BIN)/runc: upstream/runc/go.mod | $(BIN)/.deps
	$(call step,build runc,cd upstream/runc && CGO_ENABLED=1 go build -buildvcs=false -trimpath -tags seccomp -ldflags '-s -w' -o $@ github.com/opencontainers/runc)

$(BIN)/helm: upstream/helm/go.mod
	$(call step,build helm,cd upstream/helm && $(gobuild) -ldflags '-s -w' -o $@ helm.sh/helm/v3/cmd/helm)

# For the tests: what kubectl top asks.
$(BIN)/metrics-server: upstream/metrics-server/go.mod
	$(call step,build metrics-server,cd upstream/metrics-server && $(gobuild) -ldflags '-s -w' -o $@ sigs.k8s.io/metrics-server/cmd/metrics-server)

# For the tests: the OpenID Connect provider.
$(BIN)/dex: upstream/dex/go.mod upstream/dex/main.go
	$(call step,build dex,cd upstream/dex && $(gobuild) -ldflags '-s -w' -o $@ .)

$(addprefix $(BIN)/cni/,$(notdir $(CNI))): $(BIN)/cni/%: upstream/cni/go.mod
	$(call step,build cni/$*,cd upstream/cni && $(gobuild) -ldflags '-s -w' -o $@ github.com/containernetworking/plugins/plugins/$(filter %/$*,$(CNI)))

$(BIN)/golangci-lint: upstream/golangci-lint/go.mod
	$(call step,build golangci-lint,cd upstream/golangci-lint && $(gobuild) -ldflags '-s -w' -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint)

ours: $(addprefix $(BIN)/,$(OURS)) ## our own programs

# The compiler's cache decides which of them are linked again.
$(addprefix $(BIN)/,$(OURS)) &: $(SOURCES) $(BIN)/.version
	$(call step,build ours,$(gobuild) -ldflags '-s -w -X main.version=$(VERSION)' -o $(BIN)/ $(addprefix ./cmd/,$(OURS)) && touch $(addprefix $(BIN)/,$(OURS)))

ifneq ($(VERSION),$(file <$(BIN)/.version))
.PHONY: $(BIN)/.version
endif
$(BIN)/.version:
	@mkdir -p $(BIN) && echo '$(VERSION)' >$@

krew: $(BIN)/h8s ## the kubectl plugin and its manifest for krew, into bin/krew/
	@mkdir -p $(BIN)/krew && tar -czf $(BIN)/krew/h8s-linux-amd64.tar.gz -C $(BIN) h8s -C $(CURDIR) LICENSE
	@sed -e 's|@VERSION@|v0.0.0-$(VERSION)|' -e 's|@URI@|$(KREW_URI)|' -e "s|@SHA256@|$$(sha256sum $(BIN)/krew/h8s-linux-amd64.tar.gz | cut -d' ' -f1)|" deploy/krew/h8s.yaml >$(BIN)/krew/h8s.yaml

images: $(addprefix $(BIN)/images/,$(addsuffix .tar,$(IMAGES))) ## container images, as archives in bin/images

# Of our programs and of Debian's. An archive that is right already is not written again.
$(addprefix $(BIN)/images/,$(addsuffix .tar,$(IMAGES))) &: $(filter-out %_test.go,$(wildcard images/*.go images/linkage/*.go images/pause/*)) go.mod $(DPKG) $(BIN)/.deps $(BIN)/agnhost $(BIN)/containerd-shim-hyper-v1 $(BIN)/hyper/initrd.img $(BIN)/hyper/seccomp-filter $(addprefix $(BIN)/,$(OURS))
	$(call step,build images,go run ./images --bin $(BIN) --out $(BIN)/images $(IMAGES) && touch $(addprefix $(BIN)/images/,$(addsuffix .tar,$(IMAGES))))

# The VM sandbox.
hyper: $(BIN)/containerd-shim-hyper-v1 $(BIN)/hyper/initrd.img $(BIN)/hyper/seccomp-filter ## what a pod's virtual machine needs, into bin/ and bin/hyper/

$(BIN)/hyper/hyperinit: $(SOURCES)
	$(call step,build hyper/hyperinit,$(gobuild) -ldflags '-s -w' -o $@ ./cmd/hyperinit && touch $@)

$(BIN)/hyper/initrd.img $(BIN)/hyper/seccomp-filter &: $(BIN)/hyper/hyperinit $(wildcard images/guest/*.go images/guest/seccomp/* images/linkage/*.go) $(DPKG) | $(BIN)/.deps
	$(call step,build hyper/initrd.img,go run ./images/guest -out $(BIN)/hyper && touch $(BIN)/hyper/initrd.img $(BIN)/hyper/seccomp-filter)

$(BIN)/containerd-shim-hyper-v1: $(SOURCES)
	$(call step,build containerd-shim-hyper-v1,$(gobuild) -ldflags '-s -w' -o $@ ./cmd/containerd-shim-hyper-v1 && touch $@)

up: build ## a two-node cluster with two demo tenants
	@$(BIN)/h8s up --name $(NAME) --nodes $(NODES) --demo

down: ## removes the cluster and everything it made
	@if [ -x $(BIN)/h8s ]; then $(BIN)/h8s down --name $(NAME); else echo "nothing was built, so nothing is up"; fi

test: build keystone $(BIN)/dex $(BIN)/golangci-lint $(BIN)/cri-integration.test ## everything: generated code, lint, unit, kernel, cluster
	@go run ./test/runner

test-hyper: build $(BIN)/cri-integration.test ## the VM sandbox, by containerd's CRI and real virtual machines
	@go run ./test/runner -only hyper

e2e-hyper: build e2e-programs ## Kubernetes' own tests of pods, each pod in a virtual machine
	@go run ./test/runner -only conformance

bench: build ## measurements side by side with what a user would pick instead
	@go run ./bench $(ARGS)

bench-hyper: build ## virtual machines side by side with runc and gVisor; ARGS='-output json' prints that
	@go run ./bench -suite hyper $(ARGS)

bench-tenancy: build keystone ## 1,000 tenants on a control plane without nodes (docs/scale.md); ARGS='-plots docs/scale' draws
	@go run ./bench -suite tenancy $(ARGS)

lint: $(BIN)/golangci-lint
	@$(BIN)/golangci-lint run ./...
	@cd upstream/gvisor && $(BIN)/golangci-lint run ./shim/...

generate: $(BIN)/etcd $(BIN)/kube-apiserver $(BIN)/kube-controller-manager $(BIN)/helm ## deepcopy and CRDs from api/, docs/roles.md from a live API server
	@go tool controller-gen object paths=./api/...
	@go tool controller-gen crd paths=./api/... output:crd:dir=deploy/h8s/templates/crds
	@go test -count=1 ./internal/controller -run 'TestAccessMatrix$$' -update

clean:
	rm -rf $(BIN)
