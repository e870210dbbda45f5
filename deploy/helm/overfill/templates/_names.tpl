{{/* What all objects' names begin with. With a pool's name (28 at most) it stays below the 63 characters of a label. */}}
{{- define "overfill.name" -}}
{{- ternary .Release.Name (printf "%s-overfill" .Release.Name) (contains "overfill" .Release.Name) | trunc 26 | trimSuffix "-" }}
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
{{- .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "overfill.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (ternary (include "overfill.name" .) "default" .Values.serviceAccount.create) }}
{{- end }}
