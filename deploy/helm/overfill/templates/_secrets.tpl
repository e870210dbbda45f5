{{/* Secrets that a workload mounts, as a list of name, Secret and the environment that names their files. */}}
{{- define "overfill.secrets" -}}
{{- $values := .root.Values }}
{{- $name := include "overfill.name" .root }}
{{- $router := eq .workload.component "router" }}
{{- with $values.tls.doors }}{{ if and $router .enabled }}
- name: tls-doors
  secret: {{ include "overfill.doorsSecret" $.root }}
  env:
    OVERFILL_TLS_CERT: tls.crt
    OVERFILL_TLS_KEY: tls.key
    {{- if .clientCertificates }}
    OVERFILL_TLS_CA: ca.crt
    {{- end }}
{{- end }}{{ end }}
{{- with $values.tls.peers }}{{ if .enabled }}
- name: tls-peers
  secret: {{ include "overfill.peersSecret" $.root }}
  env:
    OVERFILL_PEER_TLS_CERT: tls.crt
    OVERFILL_PEER_TLS_KEY: tls.key
    OVERFILL_PEER_TLS_CA: ca.crt
{{- end }}{{ end }}
{{- with $values.etcd.tls }}{{ if .secretName }}
- name: tls-etcd
  secret: {{ .secretName }}
  env:
    OVERFILL_ETCD_CA: ca.crt
    {{- if .clientCertificate }}
    OVERFILL_ETCD_CERT: tls.crt
    OVERFILL_ETCD_KEY: tls.key
    {{- end }}
{{- end }}{{ end }}
{{- with $values.etcd.auth }}{{ if .secretName }}
- name: etcd-password
  secret: {{ .secretName }}
  env:
    OVERFILL_ETCD_PASSWORD_FILE: {{ .key }}
{{- end }}{{ end }}
{{- with $values.clusterToken }}{{ if .secretName }}
- name: cluster-token
  secret: {{ .secretName }}
  env:
    OVERFILL_CLUSTER_TOKEN_FILE: {{ .key }}
{{- end }}{{ end }}
{{- with $values.keys }}{{ if and $router .secretName }}
- name: keys
  secret: {{ .secretName }}
  env:
    OVERFILL_KEYS: {{ .key }}
{{- end }}{{ end }}
{{- end }}

{{- define "overfill.doorsSecret" -}}
{{ .Values.tls.doors.secretName | default (printf "%s-doors-tls" (include "overfill.name" .)) }}
{{- end }}

{{- define "overfill.peersSecret" -}}
{{ .Values.tls.peers.secretName | default (printf "%s-peers-tls" (include "overfill.name" .)) }}
{{- end }}
