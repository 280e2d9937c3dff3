// Package guestapi is what the host's side of a virtual machine asks of the guest
// beyond containerd's Task service: HTTP with JSON over channel.Control streams,
// one request at a time on each, keep-alive allowed.
//
//	POST   /v1/setup                 Setup: name, clock, entropy, network; once, right after boot or clone
//	PUT    /v1/disks/{serial}        Disk: wait until the disk is there and mount it; idempotent
//	PATCH  /v1/disks/{serial}        a tar archive of directories, as for volumes
//	DELETE /v1/disks/{serial}        unmount, so that the host may take the disk away
//	PUT    /v1/containers/{id}       Container: make the bundle and its root; idempotent
//	DELETE /v1/containers/{id}       remove them
//	PUT    /v1/volumes/{name}        a tar archive: the volume's content from now on (see below)
//	PUT    /v1/volumes/{name}?scratch=SIZE
//	                                 make a volume that begins empty and is the containers', of SIZE
//	                                 bytes at most (none: half of what the containers have); the archive may hold an
//	                                 entry for its root; idempotent: what is there stays
//	PATCH  /v1/volumes/{name}        a tar archive of directories: each is made where nothing is yet (subPath)
//	DELETE /v1/volumes/{name}        remove it; idempotent
//	GET    /v1/files?path=P          a regular file's last MaxFile bytes: termination messages
//	GET    /v1/events                a line of JSON (Event) for each event, past and to come, until the
//	                                 stream ends; ?follow=false: the past ones only. What ended a
//	                                 container is among them before the Task service's Wait answers
//	POST   /v1/shutdown              unmount the disks that can be written, and power off; if there are
//	                                 any, containers are killed. It answers when all is written
//
// Errors are answered as text with a status of 4xx (the host's fault) or 5xx.
package guestapi

import (
	"encoding/json"
	"net/netip"
	"time"
)

// Where things are in the guest. The directories exist when the guest answers.
const (
	// BundleDir holds an OCI bundle for each container: config.json and rootfs.
	BundleDir = "/run/h8s/containers"
	// VolumeDir holds a directory, or a file, for each volume.
	VolumeDir = "/run/h8s/volumes"
	// DiskDir holds a mount point for each disk that was mounted, by its serial.
	DiskDir = "/run/h8s/disks"
	// PipeDir holds FIFOs: a channel.Pipe stream names one by a path below it, then ":r"
	// if the host reads what a container writes, or ":w" if the host writes. It is made
	// when the stream is opened, which has to come before the process that uses it, and is
	// removed with the stream. The end of a ":r" stream is that of its last writer; when the host
	// closes it before, the rest is thrown away. When the host closes a ":w" stream, the reader
	// sees the end after all data, whenever it comes; the Task service's CloseIO does nothing.
	// When the guest closes it, nobody reads any more.
	PipeDir = "/run/h8s/pipes"
	// Runtime is the OCI runtime that the Task service runs: crun, since a program in C
	// executes a fraction of what runc does, and a guest without KVM feels that. Create's bundle, root file
	// systems and options are the guest's to choose: what the host says of them is ignored.
	Runtime = "/sbin/crun"
)

// MaxFile is the most that a GET of a file returns.
const MaxFile = 1 << 20

// Port is the name of the virtio-serial port that carries the channel.
const Port = "h8s.channel"

// Setup makes a freshly booted or cloned guest this pod's.
type Setup struct {
	Hostname  string `json:"hostname"`
	MachineID string `json:"machineID"` // 32 hexadecimal digits
	// Time is the host's clock, and Entropy fresh bytes of its random source: clones
	// of one template would otherwise draw the same numbers.
	Time    time.Time         `json:"time"`
	Entropy []byte            `json:"entropy"`
	Sysctls map[string]string `json:"sysctls,omitempty"` // in the form net.core.somaxconn
	// Links are the pod's interfaces, as its network namespace on the host has them.
	Links []Link `json:"links"`
	// Template says that the machine is saved after this: the guest does now what each clone
	// would have to do later.
	Template bool `json:"template,omitempty"`
}

// Link is one interface, found in the guest by its hardware address, or, in a clone
// whose card still has the template's, by being the only card: then the address is
// set, before the link can send anything. It has IPv6 if it has an address of it.
type Link struct {
	Name         string         `json:"name"`
	HardwareAddr string         `json:"hardwareAddr"`
	MTU          int            `json:"mtu"`
	Addresses    []netip.Prefix `json:"addresses"`
	Routes       []Route        `json:"routes"`
	Neighbours   []Neighbour    `json:"neighbours"`
}

// Route is one route of a Link; its Gateway may be invalid (none), and may be off
// link (flag onlink).
type Route struct {
	Destination netip.Prefix `json:"destination"`
	Gateway     netip.Addr   `json:"gateway"`
	OnLink      bool         `json:"onLink,omitempty"`
	ScopeLink   bool         `json:"scopeLink,omitempty"`
}

// Neighbour is a permanent neighbour entry.
type Neighbour struct {
	Address      netip.Addr `json:"address"`
	HardwareAddr string     `json:"hardwareAddr"`
}

// Disk says how a disk, which the guest knows by its SCSI serial number, is mounted
// at DiskDir/serial.
type Disk struct {
	// FileSystem is erofs, ext4 or xfs; empty: the disk is not mounted, and
	// DiskDir/serial is a symbolic link to its device node.
	FileSystem string   `json:"fileSystem,omitempty"`
	ReadOnly   bool     `json:"readOnly,omitempty"`
	Options    []string `json:"options,omitempty"`
	// Group, if not nil, gets all files, as for a pod's fsGroup, unless the root directory
	// shows that it has them.
	Group *int `json:"group,omitempty"`
}

// Container is an OCI bundle.
type Container struct {
	// Spec is the OCI runtime specification, with paths of the guest, which sets root.path
	// and linux.cgroupsPath itself.
	Spec json.RawMessage `json:"spec"`
	// Layers are the serials of the disks that make its root, the lowest first. Above
	// them is an overlay whose writes stay in the guest's memory.
	Layers []string `json:"layers"`
	// Devices are disks without a file system that the container has as block devices.
	Devices []Device `json:"devices,omitempty"`
}

// Device is a disk's node in a container. The guest adds it to Spec, as it alone knows the
// device's number.
type Device struct {
	Serial string `json:"serial"`
	Path   string `json:"path"` // in the container
	Mode   uint32 `json:"mode"` // permission bits
	UID    uint32 `json:"uid"`
	GID    uint32 `json:"gid"`
	Access string `json:"access"` // what its cgroup allows: of rwm
}

// A volume's archive (PUT /v1/volumes/{name}) holds either a tree, or one regular
// file with the name "." for a volume that is a file. Applying it is what kubelet's
// AtomicWriter does: new directories and files first, each complete before it gets
// its name, then symbolic links, each replaced by a rename, then what the archive
// does not name is removed. A file volume's content is written in place, as the
// containers' bind mounts keep the inode.

// Event is what happened in the guest without being asked for.
type Event struct {
	// OOM is the ID of a container one of whose processes the kernel killed for want of memory.
	OOM string `json:"oom,omitempty"`
}
