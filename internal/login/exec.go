package login

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	clientauthenticationv1 "k8s.io/client-go/pkg/apis/clientauthentication/v1"
)

// ExecInfoVariable is where kubectl says what it wants of a credential plugin.
const ExecInfoVariable = "KUBERNETES_EXEC_INFO"

// ParseExecInfo reads an ExecCredential of that variable: which cluster shall get the
// credential, and may somebody be asked?
func ParseExecInfo(info string) (cluster Cluster, interactive bool, err error) {
	if info == "" {
		return cluster, false, errors.New("this command is for kubectl, which calls it by itself (" + ExecInfoVariable + " is not set); `h8s login` is for people")
	}
	var request clientauthenticationv1.ExecCredential
	if err := json.Unmarshal([]byte(info), &request); err != nil {
		return cluster, false, fmt.Errorf("parse %s: %w", ExecInfoVariable, err)
	}
	if want := clientauthenticationv1.SchemeGroupVersion.String(); request.APIVersion != want || request.Kind != "ExecCredential" {
		return cluster, false, fmt.Errorf("%s speaks %s %s, and this program %s: run `h8s login` again to renew the kubeconfig", ExecInfoVariable, request.APIVersion, request.Kind, want)
	}
	target := request.Spec.Cluster
	if target == nil {
		return cluster, false, fmt.Errorf("%s does not say which cluster the credential is for: run `h8s login` again to renew the kubeconfig", ExecInfoVariable)
	}
	return Cluster{Server: target.Server, CA: string(target.CertificateAuthorityData)}, request.Spec.Interactive, nil
}

// WriteExecCredential writes the plugin's answer.
func WriteExecCredential(w io.Writer, c *Credential) error {
	expires := metav1.NewTime(c.Expires.Add(-skew))
	return json.NewEncoder(w).Encode(&clientauthenticationv1.ExecCredential{
		TypeMeta: metav1.TypeMeta{APIVersion: clientauthenticationv1.SchemeGroupVersion.String(), Kind: "ExecCredential"},
		Status: &clientauthenticationv1.ExecCredentialStatus{
			ExpirationTimestamp:   &expires,
			Token:                 c.Token,
			ClientCertificateData: c.Certificate,
			ClientKeyData:         c.Key,
		},
	})
}
