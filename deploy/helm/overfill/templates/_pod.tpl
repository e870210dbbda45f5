{{/* The pod of a workload: everything under `template`. Takes root and workload. */}}
{{- define "overfill.pod" -}}
{{- $root := .root }}
{{- $values := .root.Values }}
{{- $component := .workload.component }}
{{- $settings := .workload.settings }}
{{- $labels := dict "root" $root "component" $component "pool" .workload.pool }}
{{- $secrets := include "overfill.secrets" . | fromYamlArray }}
{{- $image := $settings.image | default $values.image }}
metadata:
  labels:
    {{- include "overfill.labels" $labels | nindent 4 }}
    {{- with $settings.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- if or $values.monitoring.annotations $settings.podAnnotations }}
  annotations:
    {{- if $values.monitoring.annotations }}
    prometheus.io/scrape: "true"
    prometheus.io/port: "9100"
    prometheus.io/path: /metrics
    {{- end }}
    {{- with $settings.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
spec:
  serviceAccountName: {{ include "overfill.serviceAccount" $root }}
  automountServiceAccountToken: {{ eq (include "overfill.asksKubernetes" (dict "root" $root "component" $component)) "true" }}
  # A Service called overfill would set variables that begin with OVERFILL_.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add (int $settings.drain.delaySeconds) (int $settings.drain.seconds) 10 }}
  securityContext:
    {{- toYaml $values.podSecurityContext | nindent 4 }}
  {{- $placed := dict "root" $root "settings" $settings "selector" $labels "generation" "pod-template-hash" }}
  {{- include "overfill.placement" $placed | trim | nindent 2 }}
  {{- with $settings.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- $inits := include "overfill.pairInits" . | trim }}
  {{- if or $inits $settings.extraInitContainers }}
  initContainers:
    {{- with $inits }}{{ . | nindent 4 }}{{ end }}
    {{- with $settings.extraInitContainers }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
  containers:
    - name: {{ $component }}
      image: {{ include "overfill.image" (dict "root" $root "image" $image) }}
      imagePullPolicy: {{ $image.pullPolicy | default $values.image.pullPolicy }}
      command: [{{ ternary "router" (printf "%s-node" $component) (eq $component "router") }}]
      {{- with $settings.extraArgs }}
      args:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      env:
        {{- include "overfill.env" (dict "root" $root "workload" .workload "secrets" $secrets) | trim | nindent 8 }}
        {{- with $settings.extraEnv }}{{ toYaml . | nindent 8 }}{{ end }}
      ports:
        {{- range include "overfill.ports" $component | fromYamlArray }}
        - name: {{ .name }}
          containerPort: {{ .port }}
        {{- end }}
      {{- range $kind, $path := dict "startup" "/live" "liveness" "/live" "readiness" "/ready" }}
      {{ $kind }}Probe:
        httpGet:
          path: {{ $path }}
          port: admin
        {{- toYaml (get $settings.probes $kind) | nindent 8 }}
      {{- end }}
      resources:
        {{- toYaml $settings.resources | nindent 8 }}
      securityContext:
        {{- toYaml $values.containerSecurityContext | nindent 8 }}
      volumeMounts:
        {{- include "overfill.pairMounts" . | trim | nindent 8 }}
        {{- if and $values.traffic (eq $component "router") }}
        - name: traffic
          mountPath: /traffic
          readOnly: true
        {{- end }}
        {{- range $secrets }}
        - name: {{ .name }}
          mountPath: /secrets/{{ .name }}
          readOnly: true
        {{- end }}
        {{- with $settings.extraVolumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
  volumes:
    {{- include "overfill.pairVolumes" . | trim | nindent 4 }}
    {{- if and $values.traffic (eq $component "router") }}
    # A whole folder: a file of its own in a pod would stay as it was at the start.
    - name: traffic
      configMap:
        name: {{ include "overfill.name" $root }}-traffic
    {{- end }}
    {{- range $secrets }}
    - name: {{ .name }}
      secret:
        secretName: {{ .secret }}
    {{- end }}
    {{- with $settings.extraVolumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end }}

{{/* Where pods of a kind run. Takes root, settings, selector (as overfill.selector does) and the label of a generation. */}}
{{- define "overfill.placement" -}}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .settings.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - labelSelector:
      matchLabels:
        {{- include "overfill.selector" $.selector | nindent 8 }}
    {{- with $.generation }}
    # The old and the new generation of a rollout are not counted together.
    matchLabelKeys: [{{ . }}]
    {{- end }}
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- with .settings.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
