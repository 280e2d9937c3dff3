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

// Paths on a machine of the control plane.
const (
	// WebhooksKubeconfig is that by which the API server's authorizer reaches h8s-controller.
	WebhooksKubeconfig = "/etc/kubernetes/h8s-webhooks.kubeconfig"
	// AdmissionKubeconfig says whom admission webhooks are shown what. It has no
	// current-context, whose user would be shown to all of those that it does not name.
	AdmissionKubeconfig = "/etc/kubernetes/h8s-admission.kubeconfig"
)

// Where h8s-controller answers the API server, beside its admission webhooks.
const (
	// AuthorizePath is for SubjectAccessReviews (authorization.k8s.io/v1).
	AuthorizePath = "/authorize"
	// TokenReviewPath is for TokenReviews (authentication.k8s.io/v1).
	TokenReviewPath = "/token-review"
)
