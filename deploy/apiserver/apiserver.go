// Package apiserver has the files that the API server of a cluster with Hypernetes
// reads, and what they lead to. docs/operations.md says where they go.
package apiserver

import _ "embed"

// Authorization is the AuthorizationConfiguration (apiserver.config.k8s.io/v1).
//
//go:embed authorization.yaml
var Authorization []byte

// Admission is the AdmissionConfiguration (apiserver.config.k8s.io/v1).
//
//go:embed admission.yaml
var Admission []byte

// WebhooksKubeconfig is the path, on a machine of the control plane, of the
// kubeconfig by which the API server reaches h8s-controller.
const WebhooksKubeconfig = "/etc/kubernetes/h8s-webhooks.kubeconfig"

// Where h8s-controller answers the API server, beside its admission webhooks.
const (
	// AuthorizePath is for SubjectAccessReviews (authorization.k8s.io/v1).
	AuthorizePath = "/authorize"
	// TokenReviewPath is for TokenReviews (authentication.k8s.io/v1).
	TokenReviewPath = "/token-review"
)
