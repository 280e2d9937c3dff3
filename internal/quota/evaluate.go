// Package quota counts what the objects of a Tenant use, in all its namespaces
// together, and decides what more it may create: exactly, however many processes
// decide at the same time and however far behind what they know is.
//
// What counts is what a ResourceQuota counts. A View is what one process knows of
// the objects that exist; a ledger (v1alpha1.QuotaLedgerSpec), which all share and
// replace by compare-and-swap, has what the Views may lack.
package quota

import (
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/runtime/schema"
	resourcehelper "k8s.io/component-helpers/resource"
	"k8s.io/component-helpers/storage/volume"
)

// The resources of which more is counted than the number of objects, and the
// namespaces that they are in.
const (
	Pods       = "pods"
	Services   = "services"
	Claims     = "persistentvolumeclaims"
	Namespaces = "namespaces"
)

const (
	countPrefix        = "count/"
	storageClassSuffix = ".storageclass.storage.k8s.io/"
	limitsPrefix       = "limits."
)

// Counted are the resources that a quota may bound. Admission is asked about
// these (deploy/h8s/templates/webhooks.yaml). Secrets are not among them: RBAC cannot
// let the controller count what it may not read.
func Counted() []schema.GroupVersionResource {
	core, apps, batch := corev1.SchemeGroupVersion, schema.GroupVersion{Group: "apps", Version: "v1"}, schema.GroupVersion{Group: "batch", Version: "v1"}
	networking := schema.GroupVersion{Group: "networking.k8s.io", Version: "v1"}
	return []schema.GroupVersionResource{
		core.WithResource(Pods), core.WithResource(Services), core.WithResource(Claims),
		core.WithResource("configmaps"), core.WithResource("serviceaccounts"), core.WithResource("replicationcontrollers"),
		apps.WithResource("deployments"), apps.WithResource("replicasets"), apps.WithResource("statefulsets"), apps.WithResource("daemonsets"),
		batch.WithResource("jobs"), batch.WithResource("cronjobs"),
		networking.WithResource("ingresses"), networking.WithResource("networkpolicies"),
		{Group: "autoscaling", Version: "v2", Resource: "horizontalpodautoscalers"},
		{Group: "policy", Version: "v1", Resource: "poddisruptionbudgets"},
	}
}

// Find returns the counted resource of that name, as "pods" or "deployments.apps".
func Find(name string) (schema.GroupVersionResource, bool) {
	for _, r := range Counted() {
		if r.GroupResource().String() == name {
			return r, true
		}
	}
	return schema.GroupVersionResource{}, false
}

// plain are the resources that a quota may also name without "count/".
var plain = []string{Claims, Services, "configmaps", "replicationcontrollers"}

// canonical is the one name of those that mean the same, in the way that
// ResourceQuota has aliases.
func canonical(name corev1.ResourceName) corev1.ResourceName {
	switch name {
	case corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourceEphemeralStorage:
		return corev1.DefaultResourceRequestsPrefix + name
	}
	if strings.HasPrefix(string(name), corev1.ResourceHugePagesPrefix) {
		return corev1.DefaultResourceRequestsPrefix + name
	}
	if counted, ok := strings.CutPrefix(string(name), countPrefix); ok && slices.Contains(plain, counted) {
		return corev1.ResourceName(counted)
	}
	return name
}

// Owner is the resource whose objects use what the name in a quota stands for. No
// name has two. It fails for a name that is not counted.
func Owner(name corev1.ResourceName) (string, error) {
	s := string(canonical(name))
	if counted, ok := strings.CutPrefix(s, countPrefix); ok {
		if _, ok := Find(counted); ok {
			return counted, nil
		}
	}
	switch name := corev1.ResourceName(s); name {
	case corev1.ResourcePods, corev1.ResourceRequestsCPU, corev1.ResourceRequestsMemory, corev1.ResourceRequestsEphemeralStorage,
		corev1.ResourceLimitsCPU, corev1.ResourceLimitsMemory, corev1.ResourceLimitsEphemeralStorage:
		return Pods, nil
	case corev1.ResourceServices, corev1.ResourceServicesLoadBalancers, corev1.ResourceServicesNodePorts:
		return Services, nil
	case corev1.ResourcePersistentVolumeClaims, corev1.ResourceRequestsStorage:
		return Claims, nil
	}
	if class, what, ok := strings.Cut(s, storageClassSuffix); ok && class != "" && (what == Claims || what == string(corev1.ResourceRequestsStorage)) {
		return Claims, nil
	}
	if requested, ok := strings.CutPrefix(s, corev1.DefaultResourceRequestsPrefix); ok && (strings.HasPrefix(requested, corev1.ResourceHugePagesPrefix) || extended(corev1.ResourceName(requested))) {
		return Pods, nil
	}
	if slices.Contains(plain, s) {
		return s, nil
	}
	return "", fmt.Errorf("quota.hard has %q, which is not counted: correct the name (a ResourceQuota's), or leave it out", name)
}

// Check refuses a quota with names that are not counted.
func Check(hard corev1.ResourceList) error {
	for _, name := range sortedNames(hard) {
		if _, err := Owner(name); err != nil {
			return err
		}
	}
	return nil
}

// Bounds are the resources that the quota says something of, sorted.
func Bounds(hard corev1.ResourceList) []string {
	var out []string
	for name := range hard {
		if owner, err := Owner(name); err == nil {
			out = append(out, owner)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// extended resources are those of devices: with a domain that is not Kubernetes' own.
func extended(name corev1.ResourceName) bool {
	return strings.Contains(string(name), "/") && !strings.Contains(string(name), corev1.ResourceDefaultNamespacePrefix)
}

// UsageOfPod is what the pod uses. A pod that has ended, or that should have ended
// by its grace period and cannot, uses no more than its place among the objects.
// If the latter is still to come, ends says when, and is zero otherwise.
func UsageOfPod(pod *corev1.Pod, now time.Time) (usage corev1.ResourceList, ends time.Time) {
	usage = corev1.ResourceList{countPrefix + Pods: one()}
	if pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded {
		return usage, time.Time{}
	}
	if pod.DeletionTimestamp != nil && pod.DeletionGracePeriodSeconds != nil {
		ends = pod.DeletionTimestamp.Add(time.Duration(*pod.DeletionGracePeriodSeconds) * time.Second)
		if now.After(ends) {
			return usage, time.Time{}
		}
	}
	usage[corev1.ResourcePods] = one()
	// A pod whose resize the node has found infeasible needs, by its status, no more than
	// before, whatever its spec asks for next: so its spec counts as well.
	usage = largest(usage, computing(pod, resourcehelper.PodResourcesOptions{UseStatusResources: true}))
	if resourcehelper.IsPodResizeInfeasible(pod) {
		usage = largest(usage, computing(pod, resourcehelper.PodResourcesOptions{}))
	}
	return usage, ends
}

func computing(pod *corev1.Pod, options resourcehelper.PodResourcesOptions) corev1.ResourceList {
	usage := corev1.ResourceList{}
	for name, q := range resourcehelper.PodRequests(pod, options) {
		if computed(name) || strings.HasPrefix(string(name), corev1.ResourceHugePagesPrefix) || extended(name) {
			usage[corev1.DefaultResourceRequestsPrefix+name] = q
		}
	}
	for name, q := range resourcehelper.PodLimits(pod, options) {
		if computed(name) {
			usage[limitsPrefix+name] = q
		}
	}
	return usage
}

func computed(name corev1.ResourceName) bool {
	return name == corev1.ResourceCPU || name == corev1.ResourceMemory || name == corev1.ResourceEphemeralStorage
}

// CheckPod refuses a pod of which a quota of CPU or memory could not count a
// container, in ResourceQuota's words.
func CheckPod(hard corev1.ResourceList, pod *corev1.Pod) error {
	if resourcehelper.IsPodLevelResourcesSet(pod) {
		return nil
	}
	containers := slices.Concat(pod.Spec.Containers, pod.Spec.InitContainers)
	var parts []string
	for _, name := range sortedNames(hard) {
		var missing []string
		for _, c := range containers {
			var has bool
			switch name {
			case corev1.ResourceCPU, corev1.ResourceRequestsCPU:
				_, has = c.Resources.Requests[corev1.ResourceCPU]
			case corev1.ResourceMemory, corev1.ResourceRequestsMemory:
				_, has = c.Resources.Requests[corev1.ResourceMemory]
			case corev1.ResourceLimitsCPU:
				_, has = c.Resources.Limits[corev1.ResourceCPU]
			case corev1.ResourceLimitsMemory:
				_, has = c.Resources.Limits[corev1.ResourceMemory]
			default:
				has = true
			}
			if !has {
				missing = append(missing, c.Name)
			}
		}
		if len(missing) > 0 {
			slices.Sort(missing)
			parts = append(parts, fmt.Sprintf("%s for: %s", name, strings.Join(missing, ",")))
		}
	}
	if len(parts) == 0 {
		return nil
	}
	return fmt.Errorf("must specify %s", strings.Join(parts, "; "))
}

// UsageOfService counts a load balancer and the node ports that the Service asks for.
func UsageOfService(service *corev1.Service) corev1.ResourceList {
	usage := corev1.ResourceList{Services: one()}
	ports := 0
	switch service.Spec.Type {
	case corev1.ServiceTypeNodePort:
		ports = len(service.Spec.Ports)
	case corev1.ServiceTypeLoadBalancer:
		usage[corev1.ResourceServicesLoadBalancers] = one()
		allocates := service.Spec.AllocateLoadBalancerNodePorts
		for _, port := range service.Spec.Ports {
			if allocates == nil || *allocates || port.NodePort != 0 {
				ports++
			}
		}
	}
	if ports > 0 {
		usage[corev1.ResourceServicesNodePorts] = *resource.NewQuantity(int64(ports), resource.DecimalSI)
	}
	return usage
}

// UsageOfClaim counts the storage that the claim asks for, or has been allocated if
// that is more, as a whole and for its class.
func UsageOfClaim(claim *corev1.PersistentVolumeClaim) corev1.ResourceList {
	usage := corev1.ResourceList{Claims: one()}
	class := corev1.ResourceName(volume.GetPersistentVolumeClaimClass(claim))
	if class != "" {
		usage[class+storageClassSuffix+Claims] = one()
	}
	storage, ok := claim.Spec.Resources.Requests[corev1.ResourceStorage]
	if !ok {
		return usage
	}
	if allocated, ok := claim.Status.AllocatedResources[corev1.ResourceStorage]; ok && allocated.Cmp(storage) > 0 {
		storage = allocated
	}
	storage = storage.DeepCopy()
	storage.RoundUp(0) // whole bytes
	usage[corev1.ResourceRequestsStorage] = storage
	if class != "" {
		usage[class+storageClassSuffix+corev1.ResourceRequestsStorage] = storage
	}
	return usage
}

// UsageOfObject counts an object of any other resource.
func UsageOfObject(resource string) corev1.ResourceList {
	return corev1.ResourceList{canonical(corev1.ResourceName(countPrefix + resource)): one()}
}

func one() resource.Quantity { return *resource.NewQuantity(1, resource.DecimalSI) }

func sortedNames(list corev1.ResourceList) []corev1.ResourceName {
	names := make([]corev1.ResourceName, 0, len(list))
	for name := range list {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
