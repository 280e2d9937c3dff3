package portal

import (
	"context"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
	"sigs.k8s.io/knftables"
)

// RemoveGuard removes the guard rules from the network namespace of the calling thread, for the time when the product
// leaves the node; that they are not there is success. It refuses as long as a portal is connected to the node, which
// nothing would guard any more.
func RemoveGuard(ctx context.Context) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("remove guard: list links: %w", err)
	}
	for _, l := range links {
		if id, ok := strings.CutPrefix(l.Attrs().Name, uplinkPrefix); ok {
			return fmt.Errorf("the guard rules stay: portal %[1]s%[2]s is still connected to this node; delete the Tenants while the agents run, or `ip link delete %[3]s%[2]s` and `ip netns delete %[1]s%[2]s`", netnsPrefix, id, uplinkPrefix)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, nftTimeout)
	defer cancel()
	nft, err := knftables.New(knftables.InetFamily, table)
	if err != nil {
		return fmt.Errorf("remove guard: nftables cannot be used, install the nft program: %w", err)
	}
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{}) // so that it can be deleted
	tx.Delete(&knftables.Table{})
	if err := nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("remove guard: %w", err)
	}
	return nil
}
