package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/accel"
	"h8s.io/hypernetes/internal/hyper/vm"
)

// anyClusterAddress is an address that clusters may have and that is no cluster's
// own (chooseSubnet): what listens there listens on every address.
var anyClusterAddress = netip.AddrFrom4([4]byte{172, 30, 255, 254}) //nolint:gochecknoglobals // a constant

// diagnoseMachine looks for what a cluster, and Hypernetes on it, needs of the
// machine.
func diagnoseMachine(ctx context.Context, binDir string) []Check {
	checks := []Check{
		verdict("programs", "in "+binDir, "", checkPrograms(binDir)),
		verdict("tools", "nft, mount, cp", "apt-get install nftables mount coreutils", checkTools()),
		verdict("cgroups", "", "mount cgroup2 at /sys/fs/cgroup, with the controllers cpu, cpuset, memory and pids", checkCgroups()),
		verdict("memory", "", "use a machine with 3 GiB of memory or more", checkMemory()).warning(),
		verdict("disk", "", "make room below "+filepath.Dir(StateRoot), checkDisk()).warning(),
		diagnoseHyper(ctx, binDir),
		verdict("resolvers", "", "pass --resolver to `h8s up`", checkResolvers()).warning(),
		verdict("DNS port", "", dnsPortFix, checkDNSPort(ctx, anyClusterAddress)),
		verdict("inotify", "", "sysctl fs.inotify.max_user_instances=1024", checkInotify("/proc")).warning(),
		verdict("bridged packets", "not filtered", "accept 172.30.0.0/16 in its forward chain, or sysctl net.bridge.bridge-nf-call-iptables=0", checkBridgeFilter(ctx)).warning(),
	}
	for _, path := range []string{"/dev/kmsg", "/dev/net/tun", "/dev/fuse"} {
		_, err := os.Stat(path)
		check := verdict(path, "", "load the kernel module, or give this container the device", err)
		if path != "/dev/kmsg" { // kubelet does not start without it
			check = check.warning()
		}
		checks = append(checks, check)
	}
	return append(checks, diagnoseKernel(ctx)...)
}

// diagnoseHyper says whether pods can be virtual machines here, and what would execute
// them. Nodes may be configured otherwise.
func diagnoseHyper(ctx context.Context, binDir string) Check {
	const name = "virtual machines"
	for _, tool := range []string{"qemu-system-x86_64", "mkfs.erofs"} {
		if _, err := exec.LookPath(tool); err != nil {
			return Check{name, CheckWarn, err.Error(), "apt-get install qemu-system-x86 erofs-utils; without them no pod of the RuntimeClass hyper starts"}
		}
	}
	if choice, ok := probedAlready(); ok {
		return passed(name, choice.Accelerator+": "+choice.Reason)
	}
	dir, err := os.MkdirTemp("", "h8s-doctor-")
	if err != nil {
		return Check{name, CheckFail, err.Error(), ""}
	}
	defer os.RemoveAll(dir)
	choice, err := accel.Choose(ctx, "", func(ctx context.Context) (bool, string, error) {
		return vm.ProbeKVM(ctx, filepath.Join(binDir, "hyper", "vmlinuz"), filepath.Join(binDir, "hyper", "initrd.img"), dir, vm.Users{})
	})
	if err != nil {
		return Check{name, CheckWarn, err.Error(), "`make build` makes the guest"}
	}
	return passed(name, choice.Accelerator+": "+choice.Reason)
}

// probedAlready is what a node of a running cluster has found out by the same probe. Where
// KVM is emulated, another one would keep a processor busy until its time is over.
func probedAlready() (accel.Choice, bool) {
	for _, name := range clusterNames() {
		c, err := loadConfig(name)
		if err != nil {
			continue
		}
		if running, err := c.running(); err != nil || !running {
			continue // what its nodes have found may be of an earlier life of the machine
		}
		for _, n := range c.Nodes {
			choice, ok, err := accel.Recorded(c.state().node(n.Name, accel.DefaultDir))
			if err == nil && ok && !choice.Forced() {
				return choice, true
			}
		}
	}
	return accel.Choice{}, false
}

// verdict is ok, or fail with the error and what to do about it.
func verdict(name, detail, fix string, err error) Check {
	if err == nil {
		return passed(name, detail)
	}
	return Check{name, CheckFail, err.Error(), fix}
}

// warning makes a failure a warning.
func (c Check) warning() Check {
	if c.Status == CheckFail {
		c.Status = CheckWarn
	}
	return c
}

func checkTools() error {
	for _, tool := range []string{"nft", "mount", "umount", "cp"} {
		if _, err := exec.LookPath(tool); err != nil {
			return err
		}
	}
	return nil
}

func checkCgroups() error {
	v1, v2, err := cgroupMounts()
	if err != nil {
		return err
	}
	have := map[string]bool{}
	for _, root := range v1 {
		// Mount points are named for their controllers, such as cpu,cpuacct.
		for controller := range strings.SplitSeq(filepath.Base(root), ",") {
			have[controller] = true
		}
	}
	for _, root := range v2 {
		data, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
		if err != nil {
			return err
		}
		for _, controller := range strings.Fields(string(data)) {
			have[controller] = true
		}
	}
	for _, controller := range []string{"cpu", "cpuset", "memory", "pids"} {
		if !have[controller] {
			return fmt.Errorf("no cgroup controller %s", controller)
		}
	}
	return nil
}

func checkMemory() error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	if total := info.Totalram * uint64(info.Unit); total < 3<<30 {
		return fmt.Errorf("%d MiB of memory", total>>20)
	}
	return nil
}

func checkDisk() error {
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(StateRoot), &fs); err != nil {
		return err
	}
	if free := fs.Bavail * uint64(fs.Bsize); free < 4<<30 {
		return fmt.Errorf("%d MiB free in %s", free>>20, filepath.Dir(StateRoot))
	}
	return nil
}

func checkResolvers() error {
	conf, err := dns.ClientConfigFromFile("/etc/resolv.conf")
	if err != nil {
		return err
	}
	if len(conf.Servers) == 0 {
		return errors.New("/etc/resolv.conf names no resolver")
	}
	return nil
}

// inotifyNeed is how many inotify instances should be free: a cluster of two nodes
// takes about 30.
const inotifyNeed = 40

// checkInotify looks for room for the inotify instances of a cluster's programs.
// Where there is none, kubelet and containerd fail with "too many open files".
func checkInotify(proc string) error {
	data, err := os.ReadFile(filepath.Join(proc, "sys/fs/inotify/max_user_instances"))
	if err != nil {
		return err
	}
	limit, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return err
	}
	fds, err := filepath.Glob(filepath.Join(proc, "[0-9]*/fd/*"))
	if err != nil {
		return err
	}
	used := 0
	for _, fd := range fds {
		// The limit is per user; what others use is counted as well, to be on the safe side.
		if target, err := os.Readlink(fd); err == nil && target == "anon_inode:inotify" {
			used++
		}
	}
	if free := limit - used; free < inotifyNeed {
		return fmt.Errorf("%d of %d inotify instances are in use, and a cluster of two nodes takes about 30", used, limit)
	}
	return nil
}

// checkBridgeFilter: where the firewall sees bridged packets, one that forwards
// nothing by default (as Docker's) drops what nodes say to each other.
func checkBridgeFilter(ctx context.Context) error {
	data, err := os.ReadFile("/proc/sys/net/bridge/bridge-nf-call-iptables")
	if errors.Is(err, os.ErrNotExist) || strings.TrimSpace(string(data)) == "0" {
		return nil
	}
	if err != nil {
		return err
	}
	rules, err := exec.CommandContext(ctx, "nft", "list", "ruleset").Output()
	if err != nil {
		return fmt.Errorf("list the firewall's rules: %w", err)
	}
	if dropsForwarded(string(rules)) {
		return errors.New("this machine's firewall drops packets between nodes")
	}
	return nil
}

// dropsForwarded says whether a rule set drops forwarded packets by default.
func dropsForwarded(rules string) bool {
	for line := range strings.Lines(rules) {
		if strings.Contains(line, "hook forward") && strings.Contains(line, "policy drop") {
			return true
		}
	}
	return false
}

// trialRules has every kind of nftables expression that Hypernetes and kube-proxy
// use.
const trialRules = `
table inet h8s-doctor {
	set recent { type ipv4_addr; flags dynamic, timeout; timeout 1m; }
	map services { type ipv4_addr . inet_proto . inet_service : verdict; }
	chain one { accept; }
	chain prerouting {
		type filter hook prerouting priority raw; policy accept;
		fib saddr . iif oif missing drop
		ct state established accept
		update @recent { ip saddr }
	}
	chain nat {
		type nat hook prerouting priority dstnat; policy accept;
		ip daddr . meta l4proto . th dport vmap @services
		numgen random mod 2 vmap { 0 : jump one, 1 : goto one }
	}
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip daddr 192.0.2.1 masquerade
	}
	chain forward {
		type filter hook forward priority filter; policy accept;
		ip daddr 192.0.2.2 reject with icmp type port-unreachable
	}
}
`

// diagnoseKernel tries features of the kernel in namespaces that end with this
// call.
func diagnoseKernel(ctx context.Context) []Check {
	result := make(chan []Check)
	go func() {
		// The thread is not given back: it ends with this goroutine, and the
		// namespaces with it.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
			result <- []Check{verdict("namespaces", "", "run h8s in a container with all privileges, or on the machine itself", err)}
			return
		}
		checks := []Check{passed("namespaces", "")}
		const module = "load the kernel module %s, or use a kernel that has it"
		checks = append(checks,
			verdict("veth", "", fmt.Sprintf(module, "veth"), netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "a"}, PeerName: "b"})),
			verdict("bridge", "", fmt.Sprintf(module, "bridge"), netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "c"}})),
			verdict("vxlan", "", fmt.Sprintf(module, "vxlan"), netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "d"}, VxlanId: 1, Port: 4789})),
		)
		nft := exec.CommandContext(ctx, "nft", "-f", "-")
		nft.Stdin = strings.NewReader(trialRules)
		out, err := nft.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
		}
		checks = append(checks, verdict("nftables", "", "install nftables 1.0.1 or newer and use a kernel with nf_tables, nft_fib, nft_numgen, nft_nat, nft_masq, nft_reject", err))
		checks = append(checks, tryOverlay())
		result <- checks
	}()
	return <-result
}

// tryOverlay must run in a mount namespace of its own.
func tryOverlay() Check {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return verdict("overlayfs", "", "", err)
	}
	if !supportsOverlay(filepath.Dir(StateRoot)) {
		return Check{"overlayfs", CheckWarn, "cannot be mounted over " + filepath.Dir(StateRoot), "nothing: images are copied instead, which is slower and takes more room"}
	}
	return passed("overlayfs", "")
}
