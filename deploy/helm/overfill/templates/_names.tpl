{{/* The release's name, which all objects' names begin with. */}}
{{- define "overfill.name" -}}
{{- if contains "overfill" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-overfill" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* What selectors go by. Takes root, and maybe component and pool. */}}
{{- define "overfill.selector" -}}
app.kubernetes.io/name: overfill
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .pool }}
overfill/pool: {{ . }}
{{- end }}
{{- end }}

{{/* Labels of an object. Takes root, and maybe component and pool. */}}
{{- define "overfill.labels" -}}
{{ include "overfill.selector" . }}
app.kubernetes.io/part-of: overfill
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{/* An image's reference. Takes root and image. */}}
{{- define "overfill.image" -}}
{{- if .image.digest }}{{ .image.repository }}@{{ .image.digest }}{{ else }}{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "overfill.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (ternary (include "overfill.name" .) "default" .Values.serviceAccount.create) }}
{{- end }}
