{{- define "h8s.labels" -}}
app.kubernetes.io/name: h8s
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "h8s.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end }}

{{/* CEL: may this user change Tenants? That is what makes an operator. */}}
{{- define "h8s.isOperator" -}}
authorizer.group('h8s.io').resource('tenants').check('update').allowed()
{{- end }}

{{/* CEL: is this one of Kubernetes' own controllers? */}}
{{- define "h8s.isKubernetes" -}}
(request.userInfo.username == 'system:kube-controller-manager' || 'system:serviceaccounts:kube-system' in request.userInfo.?groups.orValue([]))
{{- end }}

{{/* namespaceSelector: the namespaces of tenants. */}}
{{- define "h8s.tenantNamespaces" -}}
matchExpressions:
- {key: h8s.io/tenant, operator: Exists}
{{- end }}
