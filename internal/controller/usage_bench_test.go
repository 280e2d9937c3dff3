package controller

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

// BenchmarkQuota is what a quota adds to a creation while there are 1,000 tenants,
// beside what a ResourceQuota adds. One client creates one object after the
// other, in each kind of namespace in turn: in a few of each, as tenants who are at
// work do, and "first" in one after the other, where the controller holds nothing of
// the quota yet. The metrics are medians.
//
//	go test ./internal/controller -run '^$' -bench Quota -benchtime 200x -timeout 30m
func BenchmarkQuota(b *testing.B) {
	ctx := b.Context()
	tenants := 1000
	if s := os.Getenv("TENANTS"); s != "" {
		var err error
		if tenants, err = strconv.Atoi(s); err != nil {
			b.Fatal(err)
		}
	}
	quota := hard("pods", "1M", "requests.cpu", "1M", "requests.memory", "1P", "limits.cpu", "1M", "limits.memory", "1P", "configmaps", "1M")
	namespaces := map[string][]string{}
	create := func(obj client.Object) { // and leave it: the cluster goes with the benchmark
		b.Helper()
		if err := cluster.admin.Create(ctx, obj); err != nil {
			b.Fatal(err)
		}
	}
	// As many namespaces of each kind: the first creation in one costs more. Half of the tenants have a quota.
	for i := range tenants / 2 {
		none, compared := fmt.Sprintf("bench-none-%d", i), fmt.Sprintf("bench-compared-%d", i)
		create(namespaceOf(none, "", nil))
		create(namespaceOf(compared, "", nil))
		create(&corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: compared, Name: "q"}, Spec: corev1.ResourceQuotaSpec{Hard: quota}})
		namespaces["none"] = append(namespaces["none"], none)
		namespaces["ResourceQuota"] = append(namespaces["ResourceQuota"], compared)
		for kind, hard := range map[string]corev1.ResourceList{"tenant": nil, "tenant with a quota": quota} {
			t := tenantOf(fmt.Sprintf("bench-%d-%d", i, len(hard)), "10.0.0.0/16")
			t.Spec.Quota.Hard = hard
			create(t)
			create(namespaceOf(t.Name, t.Name, nil))
			namespaces[kind] = append(namespaces[kind], t.Name)
		}
	}
	deadline := time.Now().Add(10 * time.Minute)
	for ready := 0; ready < tenants/2*2; time.Sleep(time.Second) {
		var list v1alpha1.TenantList
		if err := cluster.admin.List(ctx, &list); err != nil {
			b.Fatal(err)
		}
		ready = 0
		for _, t := range list.Items {
			if len(t.Status.Namespaces) > 0 && apimeta.IsStatusConditionTrue(t.Status.Conditions, v1alpha1.ConditionReady) {
				ready++
			}
		}
		if time.Now().After(deadline) {
			b.Fatalf("%d tenants are ready", ready)
		}
	}
	eventually(b, func() error {
		return cluster.admin.Get(ctx, client.ObjectKey{Namespace: namespaces["tenant with a quota"][tenants/2-1], Name: "default"}, &corev1.ServiceAccount{})
	})

	kinds := []string{"none", "ResourceQuota", "tenant", "tenant with a quota"}
	for object, build := range map[string]func(namespace, name string) client.Object{
		"ConfigMap": func(namespace, name string) client.Object {
			return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
		},
		"Pod": func(namespace, name string) client.Object {
			return pod(namespace, name, func(p *corev1.Pod) {
				p.Spec.Containers[0].Resources = corev1.ResourceRequirements{Requests: hard("cpu", "1m", "memory", "1Mi"), Limits: hard("cpu", "1m", "memory", "1Mi")}
			})
		},
	} {
		b.Run(object, func(b *testing.B) {
			const few = 5
			took, first := map[string][]time.Duration{}, map[string][]time.Duration{}
			for i := range b.N {
				for _, kind := range kinds {
					for spread, into := range map[int]map[string][]time.Duration{few: took, len(namespaces[kind]): first} {
						obj := build(namespaces[kind][i%spread], fmt.Sprintf("%d-%d-%d", b.N, i, spread))
						start := time.Now()
						if err := cluster.admin.Create(ctx, obj); err != nil {
							b.Fatal(err)
						}
						if spread != len(namespaces[kind]) || i >= few && i < spread {
							into[kind] = append(into[kind], time.Since(start))
						}
					}
				}
			}
			base := median(took["none"])
			b.ReportMetric(median(first["tenant with a quota"])-median(first["tenant"]), "ms-added-first:quota")
			b.ReportMetric(median(first["ResourceQuota"])-median(first["none"]), "ms-added-first:ResourceQuota")
			for _, kind := range kinds {
				b.ReportMetric(median(took[kind]), "ms:"+strings.ReplaceAll(kind, " ", "-"))
			}
			b.ReportMetric(median(took["ResourceQuota"])-base, "ms-added:ResourceQuota")
			b.ReportMetric(median(took["tenant with a quota"])-median(took["tenant"]), "ms-added:quota")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func median(took []time.Duration) float64 {
	if len(took) == 0 { // too few rounds
		return 0
	}
	slices.Sort(took)
	return float64(took[len(took)/2].Microseconds()) / 1000
}
