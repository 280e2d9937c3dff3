package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
)

const (
	h8sPlugin    = "h8s-cni"
	bridgePlugin = "bridge + host-local"
	bridgeLink   = "bench0"
	// bridgeIPAM is where host-local keeps its addresses, on the disk that all else
	// of the node is on.
	bridgeIPAM = "/tmp/h8s-bench-ipam"
	h8sConf    = "/etc/cni/net.d/00-h8s.conflist"
)

// bridgeConflist is what a plain cluster uses on each node, as flannel's plugin
// asks for it: a bridge that is the pods' gateway, addresses from a local range, no
// masquerading by the plugin.
func bridgeConflist() (json.RawMessage, error) {
	type object = map[string]any
	return json.Marshal(object{
		"cniVersion": "1.0.0",
		"name":       "bench",
		"plugins": []object{{
			"type": "bridge", "bridge": bridgeLink, "isDefaultGateway": true, "hairpinMode": true, "ipMasq": false,
			"ipam": object{
				"type": "host-local", "dataDir": bridgeIPAM,
				"ranges": [][]object{{{"subnet": "10.246.0.0/24"}}},
			},
		}},
	})
}

// identity is what the container runtime tells plugins of a pod.
func identity(pod *corev1.Pod, containerID string) [][2]string {
	return [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", pod.Namespace},
		{"K8S_POD_NAME", pod.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", containerID},
		{"K8S_POD_UID", string(pod.UID)},
	}
}

// asJSON is a string as a JSON value.
func asJSON(s string) json.RawMessage {
	data, err := json.Marshal(s)
	if err != nil {
		panic(err) // strings always marshal
	}
	return data
}

func measureCNI(ctx context.Context, l *lab, o options, p *progress) (rows []Row, err error) {
	p.say("cni: %d ADDs and DELs of each plugin", o.adds)
	if err := l.ensureFixture(ctx, p); err != nil {
		return nil, err
	}
	n := l.nodes[1]
	pod := waitForever(newPod(tenantNamespace, "cni", n.name, ""))
	if err := l.createPod(ctx, pod); err != nil {
		return nil, err
	}
	if err := l.waitPod(ctx, pod, "scheduled", isScheduled); err != nil {
		return nil, err
	}
	bridge, err := bridgeConflist()
	if err != nil {
		return nil, err
	}
	driver, err := startCNI(ctx, n)
	if err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, driver.stop(), inNetns(n.netns, func() error { return removeLink(bridgeLink) }),
			os.RemoveAll(filepath.Join(n.dir, bridgeIPAM)))
	}()
	variants := []variant{
		addAndDelete(driver, h8sPlugin, "h8s", asJSON(h8sConf), pod),
		addAndDelete(driver, bridgePlugin, "bridge", bridge, pod),
	}
	// The first calls make portal and bridge.
	if _, err := interleave(ctx, 3, variants); err != nil {
		return nil, err
	}
	r, err := interleave(ctx, o.adds, variants)
	if err != nil {
		return nil, err
	}
	for _, verb := range []string{"ADD", "DEL"} {
		target := &Target{Value: 1}
		if verb == "DEL" {
			target = nil
		}
		p50, err := row("CNI", verb+" p50", "ms", r.side(h8sPlugin, verb), r.side(bridgePlugin, verb), target)
		if err != nil {
			return rows, err
		}
		// A tail is one number per run: it has no rounds.
		ours, peer := quantile(r[h8sPlugin][verb], 0.99), quantile(r[bridgePlugin][verb], 0.99)
		p99, err := row("CNI", verb+" p99", "ms", newSide(h8sPlugin, []float64{ours}), newSide(bridgePlugin, []float64{peer}), nil)
		if err != nil {
			return rows, err
		}
		rows = append(rows, p50, p99)
	}
	return rows, nil
}

// addAndDelete attaches and detaches a container that never was, under a pod's name.
func addAndDelete(driver *cniClient, name, prefix string, conflist json.RawMessage, pod *corev1.Pod) variant {
	calls := 0
	return variant{name, func(context.Context, int) (map[string]float64, error) {
		calls++
		id := fmt.Sprintf("bench-%s-%d", prefix, calls)
		add, err := driver.do(call{Verb: "ADD", ContainerID: id, Args: identity(pod, id), Conflist: conflist})
		if err != nil {
			return nil, err
		}
		del, err := driver.do(call{Verb: "DEL", ContainerID: id})
		return map[string]float64{"ADD": add.Milliseconds, "DEL": del.Milliseconds}, err
	}}
}
