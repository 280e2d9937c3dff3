package shim

import (
	"errors"
	"fmt"
	"io/fs"
	"net"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	tableName = "h8s-port-forward"

	loopbackIndex = 1 // the kernel gives it to "lo" in every network namespace

	ipv4Destination = 16 // offsets in the IPv4 header
	tcpDestination  = 2  // and in the TCP header
)

// redirectLoopback makes TCP connections from the namespace to 127.0.0.0/8 arrive at a port of its loopback
// address, and that port unreachable from any other link:
//
//	chain output { type nat hook output priority dstnat; ip daddr 127.0.0.0/8 meta l4proto tcp redirect to :port }
//	chain input { type filter hook input priority filter; iif != lo meta l4proto tcp tcp dport port drop }
//
// The second matters where route_localnet is on, which namespaces inherit from a node whose kube-proxy needs it.
func redirectLoopback(namespace netns.NsHandle, port uint16) error {
	nft, err := nftables.New(nftables.WithNetNSFd(int(namespace)))
	if err != nil {
		return err
	}
	table := nft.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: tableName})
	output := nft.AddChain(&nftables.Chain{
		Name: "output", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest,
	})
	input := nft.AddChain(&nftables.Chain{
		Name: "input", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
	})
	toPort := binaryutil.BigEndian.PutUint16(port)
	tcp := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
	}
	nft.AddRule(&nftables.Rule{Table: table, Chain: output, Exprs: append([]expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: ipv4Destination, Len: net.IPv4len},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: net.IPv4len, Mask: net.CIDRMask(8, 32), Xor: make([]byte, net.IPv4len)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: net.IPv4(127, 0, 0, 0).To4()},
	}, append(tcp,
		&expr.Immediate{Register: 1, Data: toPort},
		&expr.Redir{RegisterProtoMin: 1},
	)...)})
	nft.AddRule(&nftables.Rule{Table: table, Chain: input, Exprs: append([]expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIF, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(loopbackIndex)},
	}, append(tcp,
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: tcpDestination, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: toPort},
		&expr.Verdict{Kind: expr.VerdictDrop},
	)...)})
	return nft.Flush()
}

// restoreLoopback undoes redirectLoopback in the namespace at path. It is idempotent,
// and a namespace that is gone is no error.
func restoreLoopback(path string) error {
	namespace, err := netns.GetFromPath(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the pod's network namespace %s: %w", path, err)
	}
	defer namespace.Close()
	// A file that was a namespace's mount point remains for a moment after an unmount.
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(namespace), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		return err
	}
	return restore(namespace)
}

func restore(namespace netns.NsHandle) error {
	nft, err := nftables.New(nftables.WithNetNSFd(int(namespace)))
	if err != nil {
		return err
	}
	tables, err := nft.ListTablesOfFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return fmt.Errorf("list the tables of the pod's network namespace: %w", err)
	}
	for _, table := range tables {
		if table.Name == tableName {
			nft.DelTable(table)
		}
	}
	return nft.Flush()
}
