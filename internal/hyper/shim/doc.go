// Package shim is containerd's shim for pods that are virtual machines: one process for
// each sandbox, the parent of its QEMU. It serves containerd's Sandbox service, and the
// Task service for the pod's containers, whose work it hands to the guest with whatever
// the guest needs of the node: layers of images as disks, volumes as archives, input and
// output as streams, the network as a tap.
//
// The guest is not trusted. It is asked, never served: each answer is bounded in size and
// time, decides nothing but the fate of its own pod, and a guest that does not answer
// is ended. Paths of the node that a container gets are the pod's own, and are sent;
// nothing of the node's is mounted in a guest.
package shim
