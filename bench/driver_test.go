package main

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestDriverRefuses(t *testing.T) {
	tests := map[string]struct{ request, wantReply, wantErr string }{
		"nothing to do":                {"", "", ""},
		"DEL of what was never added":  {`{"verb":"DEL","containerID":"x"}`, "container x is not attached", ""},
		"ADD without a configuration":  {`{"verb":"ADD","containerID":"x","conflist":"/no/such/file"}`, "no such file", ""},
		"ADD with a wrong one":         {`{"verb":"ADD","containerID":"x","conflist":{"cniVersion":5}}`, "read network configuration", ""},
		"a request that is not a JSON": {`ADD`, "", "read request"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			err := serveCNI(t.Context(), strings.NewReader(tc.request), &out)
			switch {
			case tc.wantErr == "" && err != nil:
				t.Fatal(err)
			case tc.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tc.wantErr)):
				t.Fatalf("error %v, want %q", err, tc.wantErr)
			}
			var r reply
			if out.Len() > 0 {
				if err := json.Unmarshal([]byte(out.String()), &r); err != nil {
					t.Fatal(err)
				}
			}
			if !strings.Contains(r.Error, tc.wantReply) || (tc.wantReply == "") != (r.Error == "") {
				t.Errorf("reply %+v, want the error %q", r, tc.wantReply)
			}
		})
	}
}
