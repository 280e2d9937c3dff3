// Package cni is the Container Network Interface (version 1.1) of the product:
// the verbs as h8s-cni executes them, the protocol in which h8s-cni asks the node
// agent, and the delegation of pods that are no tenant's to the default network.
//
// h8s-cni is started by the container runtime for every verb, so this package
// imports little.
package cni

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
)

// Verb is a command of the CNI specification.
type Verb string

// The verbs on which the node agent is asked.
const (
	Add    Verb = "ADD"
	Del    Verb = "DEL"
	Check  Verb = "CHECK"
	Status Verb = "STATUS"
	GC     Verb = "GC"
)

// Request is one verb, as the container runtime gave it to h8s-cni.
type Request struct {
	Verb        Verb   `json:"verb"`
	ContainerID string `json:"containerID,omitempty"`
	Netns       string `json:"netns,omitempty"`
	IfName      string `json:"ifName,omitempty"`
	// Pod is whom the runtime says the container belongs to.
	Pod Pod `json:"pod,omitzero"`
	// ValidAttachments are all that exist, on GC.
	ValidAttachments []types.GCAttachment `json:"validAttachments,omitempty"`
}

// Pod is what the container runtime passes in CNI_ARGS.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// Answer is what the node agent says to a Request that succeeded.
type Answer struct {
	// Delegate says that the container is no tenant's: the default network's
	// plugins are to execute the verb.
	Delegate bool `json:"delegate,omitempty"`
	// Interface is what ADD made, for a tenant's pod.
	Interface *Interface `json:"interface,omitempty"`
}

// Interface is a pod's end of an attachment.
type Interface struct {
	Address netip.Addr `json:"address"`
	Gateway netip.Addr `json:"gateway"`
	MAC     string     `json:"mac"`
	MTU     int        `json:"mtu"`
}

// NewError returns an error that carries one of the specification's codes to the
// container runtime; its text ends up in an event of the pod.
func NewError(code uint, format string, args ...any) error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// asError gives every error a code.
func asError(err error) *types.Error {
	if e, ok := errors.AsType[*types.Error](err); ok {
		// The wrapping says more than the code's own text.
		return types.NewError(e.Code, err.Error(), "")
	}
	return types.NewError(types.ErrInternal, err.Error(), "")
}
