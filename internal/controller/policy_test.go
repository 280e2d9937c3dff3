package controller

import (
	"context"
	"fmt"
	"strings"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	nodev1 "k8s.io/api/node/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

// wantRefusal compares an error with the part of a sentence that it must have;
// empty means that there must be none.
func wantRefusal(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("refused: %v", err)
	case want != "" && err == nil:
		t.Errorf("accepted, want a refusal with %q", want)
	case want != "" && !strings.Contains(err.Error(), want):
		t.Errorf("refused with %q, want %q", err, want)
	}
}

// runtimeClass makes one that the tenants under test may not use.
func runtimeClass(t *testing.T, rc *nodev1.RuntimeClass) {
	t.Helper()
	if err := cluster.admin.Create(t.Context(), rc); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), rc) })
}

func TestPodPolicy(t *testing.T) {
	ctx := t.Context()
	runtimeClass(t, &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "runc"}, Handler: "runc"})
	newTenant(t, tenantOf("pods", "10.0.0.0/16", member("User", "pods-alice", v1alpha1.RoleOwner)))
	alice := as(t, "pods-alice")
	newNamespace(t, alice, namespaceOf("pods-a", "", nil))

	volume := func(source corev1.VolumeSource) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: source}} }
	}
	container := func(change func(*corev1.Container)) func(*corev1.Pod) {
		return func(p *corev1.Pod) { change(&p.Spec.Containers[0]) }
	}
	annotation := func(key, value string) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.Annotations = map[string]string{key: value} }
	}
	const baseline = `violates PodSecurity "baseline`
	tests := map[string]struct {
		change func(*corev1.Pod)
		want   string
	}{
		"plain":               {nil, ""},
		"its sandbox by name": {func(p *corev1.Pod) { p.Spec.RuntimeClassName = ptr.To("gvisor") }, ""},
		"its network by name": {annotation(v1alpha1.AnnotationNetworks, "pods"), ""},
		"node selector":       {func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"kubernetes.io/hostname": "n1"} }, ""},
		"harmless volumes":    {volume(corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}), ""},
		"another runtime":     {func(p *corev1.Pod) { p.Spec.RuntimeClassName = ptr.To("runc") }, "runtimeClassName runc is not allowed in this tenant: leave it out, or name one of gvisor"},
		"no runtime":          {func(p *corev1.Pod) { p.Spec.RuntimeClassName = ptr.To("") }, "resource name may not be empty"},
		"another network":     {annotation(v1alpha1.AnnotationNetworks, "globex"), "is set at admission to the Network of the namespace (pods)"},
		"no network":          {annotation(v1alpha1.AnnotationNetworks, ""), "is set at admission"},
		"another tenant":      {annotation(v1alpha1.AnnotationTenant, "globex"), "the annotation h8s.io/tenant is set at admission"},
		"no tenant":           {annotation(v1alpha1.AnnotationTenant, ""), "the annotation h8s.io/tenant is set at admission"},
		"node name":           {func(p *corev1.Pod) { p.Spec.NodeName = "n1" }, "spec.nodeName may not be set"},
		"system priority":     {func(p *corev1.Pod) { p.Spec.PriorityClassName = "system-node-critical" }, "belong to the cluster"},
		"static pod source":   {annotation("kubernetes.io/config.source", "file"), "instructions to the node"},
		"mirror pod":          {annotation("kubernetes.io/config.mirror", "x"), "mirror"},
		"runsc flags":         {annotation("dev.gvisor.flag.network", "host"), "dev.gvisor.flag.network are instructions"},
		"device injection":    {annotation("cdi.k8s.io/all", "vendor.com/dev=all"), "instructions to the node"},
		"nfs":                 {volume(corev1.VolumeSource{NFS: &corev1.NFSVolumeSource{Server: "10.0.0.1", Path: "/"}}), "volumes v are of a type that the node itself would mount"},
		"iscsi":               {volume(corev1.VolumeSource{ISCSI: &corev1.ISCSIVolumeSource{TargetPortal: "127.0.0.1", IQN: "iqn.2003-01.org:x"}}), "volumes v"},
		"flexVolume":          {volume(corev1.VolumeSource{FlexVolume: &corev1.FlexVolumeSource{Driver: "example.com/x"}}), "volumes v"},
		"gitRepo":             {volume(corev1.VolumeSource{GitRepo: &corev1.GitRepoVolumeSource{Repository: "https://example.com/x"}}), "volumes v"},
		"hostPath":            {volume(corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}), baseline},
		"hostNetwork":         {func(p *corev1.Pod) { p.Spec.HostNetwork = true }, baseline},
		"hostPID":             {func(p *corev1.Pod) { p.Spec.HostPID = true }, baseline},
		"hostIPC":             {func(p *corev1.Pod) { p.Spec.HostIPC = true }, baseline},
		"privileged":          {container(func(c *corev1.Container) { c.SecurityContext = &corev1.SecurityContext{Privileged: ptr.To(true)} }), baseline},
		"privileged init": {func(p *corev1.Pod) {
			p.Spec.InitContainers = []corev1.Container{{Name: "i", Image: "x", SecurityContext: &corev1.SecurityContext{Privileged: ptr.To(true)}}}
		}, baseline},
		"hostPort": {container(func(c *corev1.Container) { c.Ports = []corev1.ContainerPort{{ContainerPort: 80, HostPort: 80}} }), baseline},
		"added capability": {container(func(c *corev1.Container) {
			c.SecurityContext = &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"SYS_ADMIN"}}}
		}), baseline},
		"raw sockets": {container(func(c *corev1.Container) {
			c.SecurityContext = &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"NET_RAW"}}}
		}), baseline},
		"unmasked /proc": {func(p *corev1.Pod) {
			p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{ProcMount: ptr.To(corev1.UnmaskedProcMount)}
		}, "hostUsers"},
		"unconfined seccomp": {container(func(c *corev1.Container) {
			c.SecurityContext = &corev1.SecurityContext{SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeUnconfined}}
		}), baseline},
		"unsafe sysctl": {func(p *corev1.Pod) {
			p.Spec.SecurityContext = &corev1.PodSecurityContext{Sysctls: []corev1.Sysctl{{Name: "kernel.msgmax", Value: "1"}}}
		}, baseline},
		"probe of another host": {container(func(c *corev1.Container) {
			c.LivenessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Host: "169.254.169.254", Port: intstr.FromInt32(80)}}}
		}), baseline},
		"hook to another host": {container(func(c *corev1.Container) {
			c.Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Host: "10.96.0.1", Port: intstr.FromInt32(443)}}}
		}), baseline},
	}
	operator := cluster.admin
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			wantRefusal(t, alice.Create(ctx, pod("pods-a", "p", tt.change), client.DryRunAll), tt.want)
			wantRefusal(t, operator.Create(ctx, pod("pods-a", "p", tt.change), client.DryRunAll), tt.want)
		})
	}

	t.Run("what admission sets", func(t *testing.T) {
		p := pod("pods-a", "set", func(p *corev1.Pod) { p.Annotations = map[string]string{"mine": "x"} })
		if err := alice.Create(ctx, p); err != nil {
			t.Fatal(err)
		}
		if ptr.Deref(p.Spec.RuntimeClassName, "") != "gvisor" || p.Annotations[v1alpha1.AnnotationNetworks] != "pods" || p.Annotations["mine"] != "x" || p.Annotations[v1alpha1.AnnotationTenant] != "pods" {
			t.Errorf("runtimeClassName %v, annotations %v", p.Spec.RuntimeClassName, p.Annotations)
		}
	})

	t.Run("updates", func(t *testing.T) {
		p := pod("pods-a", "update", nil)
		if err := alice.Create(ctx, p); err != nil {
			t.Fatal(err)
		}
		for name, tt := range map[string]struct {
			patch, want string
		}{
			"a label":                 {`{"metadata":{"labels":{"a":"b"}}}`, ""},
			"an image":                {`{"spec":{"containers":[{"name":"main","image":"localhost/agnhost:latest"}]}}`, ""},
			"the network":             {`{"metadata":{"annotations":{"h8s.io/networks":"globex"}}}`, "never changes"},
			"no network":              {`{"metadata":{"annotations":{"h8s.io/networks":null}}}`, "never changes"},
			"the tenant":              {`{"metadata":{"annotations":{"h8s.io/tenant":"globex"}}}`, "never changes"},
			"no tenant":               {`{"metadata":{"annotations":{"h8s.io/tenant":null}}}`, "never changes"},
			"a static pod annotation": {`{"metadata":{"annotations":{"kubernetes.io/config.source":"file"}}}`, "instructions to the node"},
			"the runtime":             {`{"spec":{"runtimeClassName":"runc"}}`, "may not change fields"},
			"the host's network":      {`{"spec":{"hostNetwork":true}}`, "may not change fields"},
			"the node":                {`{"spec":{"nodeName":"n1"}}`, "may not change fields"},
		} {
			t.Run(name, func(t *testing.T) {
				target := &corev1.Pod{ObjectMeta: p.ObjectMeta}
				wantRefusal(t, alice.Patch(ctx, target, client.RawPatch("application/strategic-merge-patch+json", []byte(tt.patch)), client.DryRunAll), tt.want)
			})
		}
	})

	t.Run("ephemeral containers", func(t *testing.T) {
		p := pod("pods-a", "debug", nil)
		if err := alice.Create(ctx, p); err != nil {
			t.Fatal(err)
		}
		p.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{
			Name: "d", Image: "x", SecurityContext: &corev1.SecurityContext{Privileged: ptr.To(true)},
		}}}
		wantRefusal(t, operator.SubResource("ephemeralcontainers").Update(ctx, p.DeepCopy(), client.DryRunAll), baseline)
		wantRefusal(t, alice.SubResource("ephemeralcontainers").Update(ctx, p.DeepCopy(), client.DryRunAll), baseline)
		p.Spec.EphemeralContainers[0].SecurityContext = nil
		wantRefusal(t, operator.SubResource("ephemeralcontainers").Update(ctx, p.DeepCopy(), client.DryRunAll), "")
		wantRefusal(t, alice.SubResource("ephemeralcontainers").Update(ctx, p.DeepCopy(), client.DryRunAll), "")
	})

	t.Run("pods of a Deployment", func(t *testing.T) {
		deployment := func(name string, change func(*corev1.Pod)) *appsv1.Deployment {
			template := pod("pods-a", name, change)
			labels := map[string]string{"app": name}
			return &appsv1.Deployment{
				ObjectMeta: metav1.ObjectMeta{Namespace: "pods-a", Name: name},
				Spec: appsv1.DeploymentSpec{
					Selector: &metav1.LabelSelector{MatchLabels: labels},
					Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: template.Annotations}, Spec: template.Spec},
				},
			}
		}
		good := deployment("good", nil)
		if err := alice.Create(ctx, good); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			var list corev1.PodList
			if err := alice.List(ctx, &list, client.InNamespace("pods-a"), client.MatchingLabels{"app": "good"}); err != nil {
				return err
			}
			if len(list.Items) != 1 || ptr.Deref(list.Items[0].Spec.RuntimeClassName, "") != "gvisor" {
				return fmt.Errorf("%d pods", len(list.Items))
			}
			return nil
		})
		for name, change := range map[string]func(*corev1.Pod){
			"bad-runtime": func(p *corev1.Pod) { p.Spec.RuntimeClassName = ptr.To("runc") },
			"bad-host":    func(p *corev1.Pod) { p.Spec.HostNetwork = true },
			"bad-node":    func(p *corev1.Pod) { p.Spec.NodeName = "n1" },
		} {
			if err := alice.Create(ctx, deployment(name, change)); err != nil {
				t.Fatal(err)
			}
			eventually(t, func() error {
				var got appsv1.Deployment
				if err := alice.Get(ctx, client.ObjectKey{Namespace: "pods-a", Name: name}, &got); err != nil {
					return err
				}
				for _, c := range got.Status.Conditions {
					if c.Type == appsv1.DeploymentReplicaFailure && c.Status == corev1.ConditionTrue {
						return nil
					}
				}
				return fmt.Errorf("%s: conditions %+v", name, got.Status.Conditions)
			})
		}
	})

	t.Run("a namespace that is not completed", func(t *testing.T) {
		ns := namespaceOf("pods-raw", "nobody", map[string]string{v1alpha1.LabelNetwork: "pods"})
		if err := operator.Create(ctx, ns); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = operator.Delete(context.Background(), ns) })
		eventually(t, func() error {
			err := operator.Create(ctx, pod("pods-raw", "p", nil))
			if err == nil {
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), "has no Network, sandboxes or Pod Security level yet") {
				return err
			}
			return nil
		})
	})
}

// A RuntimeClass given by default brings its overhead and scheduling, as one given by name does.
func TestPodPolicyOverhead(t *testing.T) {
	runtimeClass(t, &nodev1.RuntimeClass{
		ObjectMeta: metav1.ObjectMeta{Name: "heavy"}, Handler: "heavy",
		Overhead:   &nodev1.Overhead{PodFixed: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("64Mi")}},
		Scheduling: &nodev1.Scheduling{NodeSelector: map[string]string{"heavy": "yes"}},
	})
	tenant := tenantOf("heavy", "10.0.0.0/16", member("User", "heavy-alice", v1alpha1.RoleOwner))
	tenant.Spec.Sandbox = v1alpha1.TenantSandbox{Default: "heavy", Allowed: []string{"heavy"}}
	newTenant(t, tenant)
	alice := as(t, "heavy-alice")
	newNamespace(t, alice, namespaceOf("heavy-a", "", nil))
	eventually(t, func() error { // the API server's cache of RuntimeClasses may be behind
		p := pod("heavy-a", "p", nil)
		if err := alice.Create(t.Context(), p, client.DryRunAll); err != nil {
			return err
		}
		if p.Spec.Overhead.Memory().String() != "64Mi" || p.Spec.NodeSelector["heavy"] != "yes" {
			return fmt.Errorf("overhead %v, nodeSelector %v", p.Spec.Overhead, p.Spec.NodeSelector)
		}
		return nil
	})
}

func TestServicePolicy(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("svc", "10.0.0.0/16", member("User", "svc-alice", v1alpha1.RoleEdit), member("User", "svc-owner", v1alpha1.RoleOwner)))
	newNamespace(t, as(t, "svc-owner"), namespaceOf("svc-a", "", nil))
	alice := as(t, "svc-alice")
	const label = "service.kubernetes.io/service-proxy-name"
	service := func(name string, change func(*corev1.Service)) *corev1.Service {
		s := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "svc-a", Name: name},
			Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "x"}, Ports: []corev1.ServicePort{{Port: 80}}},
		}
		if change != nil {
			change(s)
		}
		return s
	}
	for name, tt := range map[string]struct {
		change func(*corev1.Service)
		want   string
	}{
		"plain":    {nil, ""},
		"headless": {func(s *corev1.Service) { s.Spec.ClusterIP = "None" }, ""},
		"external name": {func(s *corev1.Service) {
			s.Spec = corev1.ServiceSpec{Type: "ExternalName", ExternalName: "example.com"}
		}, ""},
		"load balancer": {func(s *corev1.Service) { s.Spec.Type = "LoadBalancer" }, ""},
		"the label":     {func(s *corev1.Service) { s.Labels = map[string]string{label: "h8s.io"} }, ""},
		"externalIPs":   {func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"8.8.8.8"} }, "spec.externalIPs is not allowed"},
		"another proxy": {func(s *corev1.Service) { s.Labels = map[string]string{label: "mine"} }, "must be h8s.io"},
		"no proxy":      {func(s *corev1.Service) { s.Labels = map[string]string{label: ""} }, "must be h8s.io"},
	} {
		t.Run(name, func(t *testing.T) {
			wantRefusal(t, alice.Create(ctx, service("s", tt.change), client.DryRunAll), tt.want)
			wantRefusal(t, cluster.admin.Create(ctx, service("s", tt.change), client.DryRunAll), tt.want)
		})
	}

	s := service("web", nil)
	if err := alice.Create(ctx, s); err != nil {
		t.Fatal(err)
	}
	if s.Labels[label] != "h8s.io" {
		t.Errorf("labels = %v", s.Labels)
	}
	t.Run("an update adds externalIPs", func(t *testing.T) {
		change := s.DeepCopy()
		change.Spec.ExternalIPs = []string{"8.8.8.8"}
		wantRefusal(t, alice.Update(ctx, change), "spec.externalIPs")
	})
	t.Run("an update changes the label", func(t *testing.T) {
		change := s.DeepCopy()
		change.Labels[label] = "kube-proxy"
		wantRefusal(t, alice.Update(ctx, change), "must be h8s.io")
	})
	t.Run("an update leaves the label out", func(t *testing.T) {
		change := s.DeepCopy()
		change.Labels = nil
		if err := alice.Update(ctx, change); err != nil || change.Labels[label] != "h8s.io" {
			t.Errorf("labels %v, %v", change.Labels, err)
		}
	})
	t.Run("EndpointSlices carry the label", func(t *testing.T) {
		eventually(t, func() error {
			var list discoveryv1.EndpointSliceList
			if err := alice.List(ctx, &list, client.InNamespace("svc-a"), client.MatchingLabels{discoveryv1.LabelServiceName: "web"}); err != nil {
				return err
			}
			if len(list.Items) != 1 || list.Items[0].Labels[label] != "h8s.io" {
				return fmt.Errorf("EndpointSlices %v", list.Items)
			}
			return nil
		})
	})
}

func TestRoleBindingPolicy(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("rb", "10.0.0.0/16", member("User", "rb-alice", v1alpha1.RoleOwner)))
	newTenant(t, tenantOf("rb-other", "10.0.0.0/16", member("User", "rb-bob", v1alpha1.RoleOwner)))
	alice := as(t, "rb-alice")
	newNamespace(t, alice, namespaceOf("rb-a", "", nil))
	newNamespace(t, alice, namespaceOf("rb-b", "", nil))
	newNamespace(t, as(t, "rb-bob"), namespaceOf("rb-c", "", nil))

	binding := func(name string, subjects ...rbacv1.Subject) *rbacv1.RoleBinding {
		return &rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Namespace: "rb-a", Name: name},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "view"},
			Subjects:   subjects,
		}
	}
	account := func(namespace string) rbacv1.Subject {
		return rbacv1.Subject{Kind: "ServiceAccount", Namespace: namespace, Name: "default"}
	}
	user := rbacv1.Subject{Kind: "User", APIGroup: rbacv1.GroupName, Name: "rb-bob"}
	group := rbacv1.Subject{Kind: "Group", APIGroup: rbacv1.GroupName, Name: "system:authenticated"}
	for name, tt := range map[string]struct {
		binding *rbacv1.RoleBinding
		want    string
	}{
		"own ServiceAccount":                 {binding("x", account("rb-a")), ""},
		"ServiceAccount of a sibling":        {binding("x", account("rb-a"), account("rb-b")), ""},
		"nobody":                             {binding("x"), ""},
		"ServiceAccount of another tenant":   {binding("x", account("rb-c")), "of the tenant's own namespaces only"},
		"ServiceAccount of the cluster":      {binding("x", account("kube-system")), "of the tenant's own namespaces only"},
		"a user":                             {binding("x", account("rb-a"), user), "may name ServiceAccounts only"},
		"a group":                            {binding("x", group), "may name ServiceAccounts only"},
		"a name that is kept for membership": {binding("h8s:x", account("rb-a")), `start with "h8s:"`},
	} {
		t.Run(name, func(t *testing.T) {
			wantRefusal(t, alice.Create(ctx, tt.binding, client.DryRunAll), tt.want)
		})
	}
	t.Run("an operator may bind a user", func(t *testing.T) {
		wantRefusal(t, cluster.admin.Create(ctx, binding("x", user), client.DryRunAll), "")
	})
	t.Run("an update adds a user", func(t *testing.T) {
		b := binding("later", account("rb-a"))
		if err := alice.Create(ctx, b); err != nil {
			t.Fatal(err)
		}
		b.Subjects = append(b.Subjects, user)
		wantRefusal(t, alice.Update(ctx, b), "may name ServiceAccounts only")
		wantRefusal(t, alice.Delete(ctx, b), "")
	})
	t.Run("the members' bindings", func(t *testing.T) {
		var b rbacv1.RoleBinding
		if err := alice.Get(ctx, client.ObjectKey{Namespace: "rb-a", Name: "h8s:admin"}, &b); err != nil {
			t.Fatal(err)
		}
		wantRefusal(t, alice.Delete(ctx, b.DeepCopy()), "are kept in step with the Tenant's members")
		b.Subjects = []rbacv1.Subject{account("rb-a")}
		wantRefusal(t, alice.Update(ctx, &b), "are kept in step with the Tenant's members")
		wantRefusal(t, alice.DeleteAllOf(ctx, &rbacv1.RoleBinding{}, client.InNamespace("rb-a")), "are kept in step")
	})
	t.Run("a Role that gives more than she has", func(t *testing.T) {
		role := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: "rb-a", Name: "more"}, Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"resourcequotas", "pods/binding"}, Verbs: []string{"create", "update"}},
		}}
		wantRefusal(t, alice.Create(ctx, role), "attempting to grant RBAC permissions not currently held")
	})
}

func TestProxyPolicy(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("prox", "10.0.0.0/16", member("User", "prox-alice", v1alpha1.RoleOwner)))
	alice := as(t, "prox-alice")
	newNamespace(t, alice, namespaceOf("prox-a", "", nil))
	user, err := cluster.env.AddUser(userNamed("prox-alice"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := alice.Create(ctx, pod("prox-a", "web", nil)); err != nil {
		t.Fatal(err)
	}
	for name, config := range map[string]*rest.Config{"owner": user.Config(), "operator": cluster.env.Config} {
		api, err := kubernetes.NewForConfig(config)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{"pods/web/proxy", "pods/web:80/proxy/x", "services/web/proxy", "services/http:web:80/proxy/x"} {
			for _, verb := range []string{"GET", "POST", "PUT", "DELETE"} {
				t.Run(name+" "+verb+" "+path, func(t *testing.T) {
					err := api.CoreV1().RESTClient().Verb(verb).AbsPath("/api/v1/namespaces/prox-a/" + path).Do(ctx).Error()
					wantRefusal(t, err, "use kubectl port-forward instead")
				})
			}
		}
	}
}

// Members have no right to change namespaces; should an operator give it, the
// labels that bind a namespace stay closed.
func TestNamespacePolicy(t *testing.T) {
	ctx := t.Context()
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "test-labeller"}, Rules: []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"namespaces"}, Verbs: []string{"get", "update", "patch"}}}}
	bind := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "test-labeller"}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "test-labeller"},
		Subjects: []rbacv1.Subject{{Kind: "User", APIGroup: rbacv1.GroupName, Name: "nsp-alice"}},
	}
	for _, obj := range []client.Object{role, bind} {
		if err := cluster.admin.Create(ctx, obj); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), obj) })
	}
	newTenant(t, tenantOf("nsp", "10.0.0.0/16", member("User", "nsp-alice", v1alpha1.RoleOwner)))
	alice := as(t, "nsp-alice")
	newNamespace(t, alice, namespaceOf("nsp-a", "", nil))
	const refused = "change by operators only"
	for name, tt := range map[string]struct{ patch, want string }{
		"her own label":       {`{"metadata":{"labels":{"team":"a"}}}`, ""},
		"a recommended one":   {`{"metadata":{"labels":{"app.kubernetes.io/part-of":"a"}}}`, ""},
		"kubectl apply":       {`{"metadata":{"annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{}"}}}`, ""},
		"the tenant":          {`{"metadata":{"labels":{"h8s.io/tenant":"globex"}}}`, refused},
		"no tenant":           {`{"metadata":{"labels":{"h8s.io/tenant":null}}}`, refused},
		"the network":         {`{"metadata":{"labels":{"h8s.io/network":"globex"}}}`, refused},
		"the sandbox":         {`{"metadata":{"labels":{"h8s.io/sandbox":"runc"}}}`, refused},
		"the sandboxes":       {`{"metadata":{"annotations":{"h8s.io/sandboxes":"runc"}}}`, refused},
		"the creator":         {`{"metadata":{"annotations":{"h8s.io/creator":null}}}`, refused},
		"privileged pods":     {`{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":"privileged"}}}`, refused},
		"an old baseline":     {`{"metadata":{"labels":{"pod-security.kubernetes.io/enforce-version":"v1.0"}}}`, refused},
		"devices of others":   {`{"metadata":{"labels":{"resource.kubernetes.io/admin-access":"true"}}}`, refused},
		"default tolerations": {`{"metadata":{"annotations":{"scheduler.alpha.kubernetes.io/defaultTolerations":"[]"}}}`, refused},
	} {
		t.Run(name, func(t *testing.T) {
			patch := client.RawPatch("application/merge-patch+json", []byte(tt.patch))
			eventually(t, func() error { // RBAC of the test may not be in force yet
				err := alice.Patch(ctx, namespaceOf("nsp-a", "", nil), patch, client.DryRunAll)
				if err != nil && strings.Contains(err.Error(), "cannot patch resource") {
					return err
				}
				wantRefusal(t, err, tt.want)
				return nil
			})
			wantRefusal(t, cluster.admin.Patch(ctx, namespaceOf("nsp-a", "", nil), patch, client.DryRunAll), "")
		})
	}
}

// Without the webhook nobody gets a namespace that belongs to no tenant.
func TestNamespacePolicyWithoutWebhook(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("nowh", "10.0.0.0/16", member("User", "nowh-alice", v1alpha1.RoleOwner)))
	alice := as(t, "nowh-alice")
	var config admissionregistrationv1.MutatingWebhookConfiguration
	if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "h8s"}, &config); err != nil {
		t.Fatal(err)
	}
	if err := cluster.admin.Delete(ctx, &config); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		err := alice.Create(ctx, namespaceOf("nowh-a", "nowh", nil), client.DryRunAll)
		if err == nil || !strings.Contains(err.Error(), "was not put into a tenant because the webhook") {
			return fmt.Errorf("answer: %w", err)
		}
		return nil
	})
	config.ResourceVersion, config.UID = "", ""
	if err := cluster.admin.Create(ctx, &config); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return alice.Create(ctx, namespaceOf("nowh-a", "nowh", nil), client.DryRunAll) })
}

func TestNodePolicy(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("agents", "10.0.0.0/16"))
	for _, name := range []string{"agents-n1", "agents-n2"} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if err := cluster.admin.Create(ctx, node); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), node) })
	}
	agent := func(extra map[string][]string) client.Client {
		return impersonate(t, rest.ImpersonationConfig{UserName: nodeAgent, Groups: []string{"system:serviceaccounts", "system:serviceaccounts:" + release, "system:authenticated"}, Extra: extra})
	}
	n1 := agent(map[string][]string{"authentication.kubernetes.io/node-name": {"agents-n1"}})
	block := func(name, node, cidr string) *v1alpha1.Block {
		return &v1alpha1.Block{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.BlockSpec{Network: "agents", CIDR: cidr, Node: node}}
	}
	other := block("agents-10-0-0-16", "agents-n2", "10.0.0.16/28")
	if err := cluster.admin.Create(ctx, other); err != nil {
		t.Fatal(err)
	}
	const refused = "of its own node only"
	own := block("agents-10-0-0-0", "agents-n1", "10.0.0.0/28")
	wantRefusal(t, n1.Create(ctx, own), "")
	wantRefusal(t, n1.Create(ctx, block("agents-10-0-0-32", "agents-n2", "10.0.0.32/28")), refused)
	wantRefusal(t, n1.Delete(ctx, other.DeepCopy()), refused)
	wantRefusal(t, agent(nil).Create(ctx, block("agents-10-0-0-32", "agents-n1", "10.0.0.32/28")), refused)
	wantRefusal(t, n1.Delete(ctx, own), "")

	network := &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: "agents"}}
	patch := func(s string) client.Patch { return client.RawPatch("application/merge-patch+json", []byte(s)) }
	wantRefusal(t, n1.Status().Patch(ctx, network, patch(`{"status":{"id":1}}`)), "the condition Conflict of a Network and nothing else")
	wantRefusal(t, n1.Status().Patch(ctx, network, patch(`{"status":{"id":null}}`)), "the condition Conflict of a Network and nothing else")
	wantRefusal(t, n1.Status().Patch(ctx, network, patch(`{"status":{"conditions":[]}}`)), "the condition Conflict of a Network and nothing else")
	wantRefusal(t, n1.Patch(ctx, network, patch(`{"spec":{"egress":{"internet":false}}}`)), "cannot patch")

	t.Run("nodes", func(t *testing.T) {
		for name, tt := range map[string]struct{ node, patch, want string }{
			"its own label":     {"agents-n1", `{"metadata":{"labels":{"h8s.io/node-ready":"true"}}}`, ""},
			"its accelerator":   {"agents-n1", `{"metadata":{"labels":{"h8s.io/hyper":"tcg"}}}`, ""},
			"of another":        {"agents-n2", `{"metadata":{"labels":{"h8s.io/node-ready":"true"}}}`, "of its own node and nothing else"},
			"another label":     {"agents-n1", `{"metadata":{"labels":{"zone":"a"}}}`, "of its own node and nothing else"},
			"an annotation":     {"agents-n1", `{"metadata":{"annotations":{"a":"b"}}}`, "of its own node and nothing else"},
			"its taints":        {"agents-n1", `{"spec":{"taints":[]}}`, "of its own node and nothing else"},
			"to be schedulable": {"agents-n1", `{"spec":{"unschedulable":true}}`, "of its own node and nothing else"},
		} {
			t.Run(name, func(t *testing.T) {
				node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: tt.node}}
				wantRefusal(t, n1.Patch(ctx, node, patch(tt.patch), client.DryRunAll), tt.want)
			})
		}
	})

	t.Run("the controller keeps a node's Conflict", func(t *testing.T) {
		var n v1alpha1.Network
		eventually(t, func() error {
			if err := n1.Get(ctx, client.ObjectKey{Name: "agents"}, &n); err != nil {
				return err
			}
			before := n.DeepCopy()
			apimeta.SetStatusCondition(&n.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionConflict, Status: "True", Reason: "NodeConflict", Message: "node agents-n1 has a route to 10.0.0.0/16"})
			return n1.Status().Patch(ctx, &n, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
		})
		newNamespace(t, cluster.admin, namespaceOf("agents-a", "agents", nil)) // makes the controller write the status
		eventually(t, func() error {
			if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "agents"}, &n); err != nil {
				return err
			}
			if len(n.Status.Namespaces) != 1 || apimeta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionConflict) == nil {
				return fmt.Errorf("status %+v", n.Status)
			}
			return nil
		})
	})
	if err := cluster.admin.Delete(ctx, other); err != nil {
		t.Fatal(err)
	}
}
