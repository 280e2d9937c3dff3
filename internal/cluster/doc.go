// Package cluster is the embedded cluster behind `h8s up`: upstream Kubernetes
// on one machine, with one set of namespaces (network, mount, PID, UTS, IPC) per
// node instead of one machine per node.
//
// Three kinds of process make a cluster:
//
//   - The supervisor, one per cluster, in the machine's own namespaces. It owns
//     the bridge, answers the nodes' DNS queries and starts one init per node
//     again whenever it dies.
//   - Node init, PID 1 of a node. It makes the node's root file system and
//     network, then starts the node's programs and restarts whichever dies.
//     It lives no longer than the supervisor, and nothing in the node lives
//     longer than it: the kernel ends a PID namespace with its PID 1.
//   - The programs: etcd, kube-apiserver, kube-controller-manager and
//     kube-scheduler on the first node; containerd, kubelet and kube-proxy on all.
//
// Everything is in one state directory, one bridge and one cgroup per cluster, so
// that `h8s down` can remove a cluster whose processes were killed at any point.
//
// What a file or command line says is computed by pure functions (render*.go,
// pki.go, subnet.go); the other files put it into effect.
package cluster
