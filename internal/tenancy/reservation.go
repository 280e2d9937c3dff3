package tenancy

import (
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"h8s.io/hypernetes/api/v1alpha1"
)

// Outstanding are the reservations that still count: their namespaces do not
// exist yet, and their time is not over. It leaves its arguments as they are.
func Outstanding(reservations []v1alpha1.Reservation, exist map[types.UID]bool, now time.Time) []v1alpha1.Reservation {
	return slices.DeleteFunc(slices.Clone(reservations), func(r v1alpha1.Reservation) bool {
		return exist[r.UID] || now.After(r.Until.Time)
	})
}
