{{/* What the servers are told by their environment; `extraEnv` and `extraArgs` come after it. Takes root, workload and secrets. */}}
{{- define "overfill.env" -}}
{{- $values := .root.Values }}
{{- $settings := .workload.settings }}
{{- $component := .workload.component }}
- name: OVERFILL_PAIR
  value: {{ include "overfill.pairFolders" . }}
- name: OVERFILL_ETCD
  value: {{ include "overfill.etcdEndpoints" .root }}
- name: OVERFILL_CLUSTER
  value: {{ $values.etcd.cluster | default (printf "%s.%s" .root.Release.Namespace .root.Release.Name) }}
{{- with $values.etcd.auth.user }}
- name: OVERFILL_ETCD_USER
  value: {{ . | quote }}
{{- end }}
- name: OVERFILL_ADMIN
  value: 0.0.0.0:9100
{{- if eq $component "router" }}
- name: OVERFILL_HTTP
  value: 0.0.0.0:8000
- name: OVERFILL_GRPC
  value: 0.0.0.0:8001
{{- if $settings.threads }}
- name: OVERFILL_ROUTER_THREADS
  value: {{ $settings.threads | quote }}
{{- end }}
- name: OVERFILL_ROUTER_DRAIN_TIMEOUT
  value: {{ $settings.drain.seconds | quote }}
{{- else }}
{{- $port := ternary 7001 7002 (eq $component "prefill") }}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: OVERFILL_LISTEN
  value: 0.0.0.0:{{ $port }}
- name: OVERFILL_ADVERTISE
  value: $(POD_IP):{{ $port }}
- name: OVERFILL_THREADS
  {{- if $settings.threads }}
  value: {{ $settings.threads | quote }}
  {{- else }}
  {{- $cores := dig "requests" "cpu" (dig "limits" "cpu" "" $settings.resources) $settings.resources }}
  {{- if not $cores }}
  {{- fail (printf "%s: threads is 0, so as many as cores are requested: say how many in resources.requests.cpu" $component) }}
  {{- end }}
  valueFrom:
    resourceFieldRef:
      containerName: {{ $component }}
      resource: requests.cpu
  {{- end }}
- name: OVERFILL_KV_MEMORY
  value: {{ $settings.kvMemory | quote }}
- name: OVERFILL_DRAIN_TIMEOUT
  value: {{ $settings.drain.seconds | quote }}
{{- end }}
- name: OVERFILL_DRAIN_DELAY
  value: {{ $settings.drain.delaySeconds | quote }}
- name: OVERFILL_LOG
  value: {{ $values.log.filter | quote }}
- name: OVERFILL_LOG_FORMAT
  value: {{ $values.log.format }}
{{- with $values.otlpEndpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if $values.tls.peers.enabled }}
- name: OVERFILL_PEER_TLS_NAME
  value: {{ $values.tls.peers.name }}
{{- end }}
{{- range $secret := .secrets }}
{{- range $variable, $file := $secret.env }}
- name: {{ $variable }}
  value: /secrets/{{ $secret.name }}/{{ $file }}
{{- end }}
{{- end }}
{{- end }}

{{- define "overfill.etcdEndpoints" -}}
{{- if .Values.etcd.enabled }}
{{- $name := include "overfill.name" . }}
{{- $members := list }}
{{- range $index := until (int .Values.etcd.replicas) }}
{{- $members = append $members (printf "%s-etcd-%d.%s-etcd:2379" $name $index $name) }}
{{- end }}
{{- join "," $members }}
{{- else }}
{{- join "," .Values.etcd.endpoints | required "etcd.enabled is false: say in etcd.endpoints where yours is" }}
{{- end }}
{{- end }}
