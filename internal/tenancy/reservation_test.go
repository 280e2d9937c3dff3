package tenancy

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"h8s.io/hypernetes/api/v1alpha1"
)

func TestOutstanding(t *testing.T) {
	now := time.Unix(1000, 0)
	reservation := func(uid string, seconds int64) v1alpha1.Reservation {
		return v1alpha1.Reservation{UID: types.UID(uid), Namespace: "of-" + uid, Until: metav1.Unix(1000+seconds, 0)}
	}
	for name, tt := range map[string]struct {
		have  []v1alpha1.Reservation
		exist map[types.UID]bool
		want  []v1alpha1.Reservation
	}{
		"none":            {nil, nil, nil},
		"under way":       {[]v1alpha1.Reservation{reservation("a", 1), reservation("b", 30)}, nil, []v1alpha1.Reservation{reservation("a", 1), reservation("b", 30)}},
		"until this time": {[]v1alpha1.Reservation{reservation("a", 0)}, nil, []v1alpha1.Reservation{reservation("a", 0)}},
		"over":            {[]v1alpha1.Reservation{reservation("a", -1), reservation("b", 1)}, nil, []v1alpha1.Reservation{reservation("b", 1)}},
		"created":         {[]v1alpha1.Reservation{reservation("a", 1), reservation("b", 1)}, map[types.UID]bool{"a": true, "z": true}, []v1alpha1.Reservation{reservation("b", 1)}},
		"a namesake is not it": {
			[]v1alpha1.Reservation{reservation("a", 1)}, map[types.UID]bool{"of-a": true}, []v1alpha1.Reservation{reservation("a", 1)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Outstanding(tt.have, tt.exist, now)); diff != "" {
				t.Errorf("- want, + got:\n%s", diff)
			}
		})
	}
}
