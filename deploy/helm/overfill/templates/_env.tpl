{{/* What the servers are told by their environment; `extraEnv` and `extraArgs` come after it. Takes root, workload and secrets. */}}
{{- define "overfill.env" -}}
{{- $values := .root.Values }}
{{- $settings := .workload.settings }}
{{- $component := .workload.component }}
- name: OVERFILL_PAIR
  value: {{ include "overfill.pairFolders" . }}
{{- if eq $values.discovery "kubernetes" }}
- name: OVERFILL_DISCOVER
  value: kubernetes://{{ .root.Release.Namespace }}
{{- else }}
- name: OVERFILL_ETCD
  value: {{ include "overfill.etcdEndpoints" .root }}
{{- end }}
- name: OVERFILL_CLUSTER
  value: {{ include "overfill.cluster" .root }}
{{- with $values.etcd.auth.user }}
- name: OVERFILL_ETCD_USER
  value: {{ . | quote }}
{{- end }}
- name: OVERFILL_ADMIN
  value: 0.0.0.0:9100
{{- if eq $component "router" }}
{{- if $values.traffic }}
- name: OVERFILL_TRAFFIC
  value: /traffic/traffic.json
{{- end }}
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
{{- if hasPrefix "cuda" $settings.device }}
{{- $asked := false }}
{{- range $name, $count := $settings.resources.limits }}{{ if and (contains "/" $name) $count }}{{ $asked = true }}{{ end }}{{ end }}
{{- if not (or $asked $settings.resources.claims) }}
{{- fail (printf "%s.device is %s, and its pods ask for no GPU: resources.limits, e.g. { nvidia.com/gpu: 1 }, or resources.claims" $component $settings.device) }}
{{- end }}
{{- end }}
- name: OVERFILL_DEVICE
  value: {{ $settings.device | quote }}
{{- if $settings.nccl }}
{{- if not (hasPrefix "cuda" $settings.device) }}
{{- fail (printf "%s.nccl sends from a GPU's memory, and %s.device is %s" $component $component $settings.device) }}
{{- end }}
{{- if or $values.tls.peers.enabled $values.clusterToken.secretName }}
{{- fail (printf "%s.nccl sends KV caches in plain text and asks nobody who they are: leave it out where nodes have certificates or a token" $component) }}
{{- end }}
- name: OVERFILL_NCCL
  value: "on"
{{- end }}
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

{{/* Name of the cluster, by which its processes find each other. */}}
{{- define "overfill.cluster" -}}
{{- if eq .Values.discovery "kubernetes" }}
{{- .Release.Name }}
{{- else }}
{{- .Values.etcd.cluster | default (printf "%s.%s" .Release.Namespace .Release.Name) }}
{{- end }}
{{- end }}

{{/* Whether this release has an etcd of its own: "true", or nothing. */}}
{{- define "overfill.ownEtcd" -}}
{{- if and .Values.etcd.enabled (eq .Values.discovery "etcd") }}true{{ end }}
{{- end }}

{{/* Whether pods of a component ask the Kubernetes API: "true", or nothing. Decode nodes look for nobody. Takes root and component. */}}
{{- define "overfill.asksKubernetes" -}}
{{- if and (eq .root.Values.discovery "kubernetes") (has .component (list "router" "prefill")) }}true{{ end }}
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
