package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/quota"
)

// usageWebhook counts what is created or grows in a tenant's namespace against
// spec.quota.hard. It validates, so it comes when all else has been checked and the
// API server has given the object its UID.
type usageWebhook struct{ *accounts }

// Handle implements admission.Handler.
func (w *usageWebhook) Handle(ctx context.Context, req admission.Request) admission.Response {
	refusal, err := w.judge(ctx, req)
	return verdict(refusal, err, http.StatusServiceUnavailable)
}

// judge returns a refusal for the user to read, or an error that is ours.
func (w *usageWebhook) judge(ctx context.Context, req admission.Request) (refusal, err error) {
	resource := schema.GroupResource{Group: req.Resource.Group, Resource: req.Resource.Resource}
	kind := resource.String()
	tenant, err := w.tenantOf(ctx, req.Namespace)
	if err != nil || tenant == nil {
		return nil, err
	}
	hard := corev1.ResourceList{}
	for name, q := range tenant.Spec.Quota.Hard {
		if owner, err := quota.Owner(name); err == nil && owner == kind {
			hard[name] = q
		}
	}
	if len(hard) == 0 {
		return nil, nil
	}
	object, pod, err := w.read(kind, req.Object.Raw)
	if err != nil {
		return nil, err
	}
	claim := quota.Claim{
		UID: object.UID, Resource: kind, Namespace: req.Namespace, Name: object.Name, Usage: object.Usage,
		DryRun: req.DryRun != nil && *req.DryRun,
	}
	if req.Operation == admissionv1.Update {
		old, _, err := w.read(kind, req.OldObject.Raw)
		if err != nil {
			return nil, err
		}
		claim.After, claim.Before = old.Revision, old.Usage
		if !claim.Grows() { // nor does it wait for the ledger
			return nil, nil
		}
	} else if w.view.Has(kind, req.Namespace, claim.Name) {
		// This creation would fail later, and keep its place for a while.
		gvr := schema.GroupVersionResource(req.Resource)
		switch _, err := w.feeds.meta.Resource(gvr).Namespace(req.Namespace).Get(ctx, claim.Name, metav1.GetOptions{}); {
		case err == nil:
			return apierrors.NewAlreadyExists(resource, claim.Name), nil
		case !apierrors.IsNotFound(err):
			return nil, fmt.Errorf("look for %s %s: %w", kind, claim.Name, err)
		}
	}
	if pod != nil {
		if err := quota.CheckPod(hard, pod); err != nil {
			return fmt.Errorf("failed quota: Tenant %s: %w", tenant.Name, err), nil
		}
	}
	err = w.reserve(ctx, tenant, claim)
	var exceeded *quota.ExceededError
	if errors.As(err, &exceeded) {
		return exceeded, nil
	}
	return nil, err
}

// tenantOf is the tenant whose namespace it is, nil if it is nobody's.
func (w *usageWebhook) tenantOf(ctx context.Context, namespace string) (*v1alpha1.Tenant, error) {
	name := w.view.TenantOf(namespace)
	if name == "" { // the API server says it has one: it is new
		meta, err := w.feeds.namespace(ctx, namespace)
		if err != nil {
			return nil, fmt.Errorf("get the namespace %s: %w", namespace, err)
		}
		if name = meta.Labels[v1alpha1.LabelTenant]; name == "" {
			return nil, nil
		}
	}
	var t v1alpha1.Tenant
	err := w.cached.Get(ctx, client.ObjectKey{Name: name}, &t)
	if apierrors.IsNotFound(err) { // or new as well
		err = w.direct.Get(ctx, client.ObjectKey{Name: name}, &t)
	}
	if apierrors.IsNotFound(err) {
		return nil, nil // no Tenant, no quota; its pods get no Network either
	}
	if err != nil {
		return nil, fmt.Errorf("get the Tenant %s: %w", name, err)
	}
	return &t, nil
}

// read tells what the object uses; pod is nil if it is none.
func (w *usageWebhook) read(kind string, raw []byte) (object quota.Object, pod *corev1.Pod, err error) {
	var obj metav1.Object
	switch kind {
	case quota.Pods:
		pod = &corev1.Pod{}
		obj = pod
	case quota.Services:
		obj = &corev1.Service{}
	case quota.Claims:
		obj = &corev1.PersistentVolumeClaim{}
	default:
		obj = &metav1.PartialObjectMetadata{}
	}
	if err := json.Unmarshal(raw, obj); err != nil {
		return object, nil, fmt.Errorf("read the %s: %w", kind, err)
	}
	object, err = objectOf(kind, obj)
	return object, pod, err
}
