{{/* The folders of a workload's pairs, as the binaries take them. */}}
{{- define "overfill.pairFolders" -}}
{{- $folders := list }}
{{- range $name := .workload.pairs }}
{{- $pair := get $.root.Values.pairs $name }}
{{- $path := $pair.path | default (ternary "pair" "" (and (hasKey $pair "images") (not (dig "images" "copy" false $pair)))) }}
{{- if $pair.pull }}{{ $path = $pair.pull.sha256 }}{{ end }}
{{- $folders = append $folders (printf "/pairs/%s/%s" $name $path | trimSuffix "/") }}
{{- end }}
{{- join "," $folders }}
{{- end }}

{{- define "overfill.pairMounts" -}}
{{- range .workload.pairs }}
- name: pair-{{ . }}
  mountPath: /pairs/{{ . }}
  readOnly: true
{{- end }}
{{- end }}

{{- define "overfill.pairVolumes" -}}
{{- range $name := .workload.pairs }}
{{- $pair := get $.root.Values.pairs $name }}
{{- $ways := list }}
{{- range list "volume" "images" "pull" }}{{ if get $pair . }}{{ $ways = append $ways . }}{{ end }}{{ end }}
{{- if gt (len $ways) 1 }}{{ fail (printf "pairs.%s has %s: give one of them" $name (join " and " $ways)) }}{{ end }}
{{- if and $pair.pull $pair.path }}{{ fail (printf "pairs.%s has pull and a path: what is pulled has its own" $name) }}{{ end }}
- name: pair-{{ $name }}
{{- if $pair.volume }}
  {{- toYaml $pair.volume | nindent 2 }}
{{- else if $pair.pull }}
  {{- toYaml ($pair.pull.cache | default (dict "emptyDir" dict)) | nindent 2 }}
{{- with $pair.pull.credentialsSecret }}
- name: pull-{{ $name }}-credentials
  secret:
    secretName: {{ . }}
{{- end }}
{{- with $pair.pull.caSecret }}
- name: pull-{{ $name }}-ca
  secret:
    secretName: {{ . }}
{{- end }}
{{- else if dig "images" "copy" false $pair }}
  emptyDir: {}
{{- else if $pair.images }}
  image:
    reference: {{ include "overfill.pairImage" (dict "name" $name "pair" $pair "component" $.workload.component) }}
    pullPolicy: {{ $pair.images.pullPolicy | default "IfNotPresent" }}
{{- else }}
{{- fail (printf "pairs.%s says neither `volume` nor `images` nor `pull`: where do its weights lie?" $name) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "overfill.pairImage" -}}
{{- get .pair.images .component | required (printf "pairs.%s.images has no image for %s" .name .component) }}
{{- end }}

{{/* What brings weights into the pod: a copy of an image that cannot be mounted, or a pull. */}}
{{- define "overfill.pairInits" -}}
{{- range $name := .workload.pairs }}
{{- $pair := get $.root.Values.pairs $name }}
{{- $in := dict "root" $.root "component" $.workload.component "name" $name "pair" $pair }}
{{- if dig "images" "copy" false $pair }}
{{- include "overfill.pairCopy" $in }}
{{- else if $pair.pull }}
{{- include "overfill.pairPull" $in }}
{{- end }}
{{- end }}
{{- end }}

{{- define "overfill.pairCopy" }}
- name: copy-{{ .name }}
  image: {{ include "overfill.pairImage" . }}
  imagePullPolicy: {{ .pair.images.pullPolicy | default "IfNotPresent" }}
  command: ["cp", "-r", "/pair/.", "/to/"]
  resources:
    requests: { cpu: 100m, memory: 64Mi }
    limits: { memory: 256Mi }
  securityContext:
    {{- toYaml .root.Values.containerSecurityContext | nindent 4 }}
  volumeMounts:
    - name: pair-{{ .name }}
      mountPath: /to
{{- end }}

{{- define "overfill.pairPull" }}
{{- $pull := .pair.pull }}
- name: pull-{{ .name }}
  image: {{ include "overfill.image" (dict "root" .root "image" .root.Values.cliImage) }}
  imagePullPolicy: {{ .root.Values.cliImage.pullPolicy }}
  command: [overfill, pull]
  args:
    - {{ include "overfill.pullSource" . }}
    - --half={{ .component }}
    # A folder for each version: pods of an older one go on with theirs where the cache is shared.
    - --to=/pairs/{{ .name }}/{{ $pull.sha256 }}
    - --sha256={{ $pull.sha256 }}
    {{- if $pull.credentialsSecret }}
    {{- $key := $pull.credentialsKey | default ".dockerconfigjson" }}
    - --{{ ternary "token" "auth" (eq $key "token") }}-file=/secrets/pull-{{ .name }}-credentials/{{ $key }}
    {{- end }}
    {{- if $pull.caSecret }}
    - --ca-file=/secrets/pull-{{ .name }}-ca/ca.crt
    {{- end }}
    {{- if $pull.plainHttp }}
    - --plain-http
    {{- end }}
  {{- with $pull.env }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  resources:
    {{- $least := dict "requests" (dict "cpu" "500m" "memory" "64Mi") "limits" (dict "memory" "256Mi") }}
    {{- toYaml ($pull.resources | default $least) | nindent 4 }}
  securityContext:
    {{- toYaml .root.Values.containerSecurityContext | nindent 4 }}
  volumeMounts:
    - name: pair-{{ .name }}
      mountPath: /pairs/{{ .name }}
    {{- if $pull.credentialsSecret }}
    - name: pull-{{ .name }}-credentials
      mountPath: /secrets/pull-{{ .name }}-credentials
      readOnly: true
    {{- end }}
    {{- if $pull.caSecret }}
    - name: pull-{{ .name }}-ca
      mountPath: /secrets/pull-{{ .name }}-ca
      readOnly: true
    {{- end }}
{{- end }}

{{/* Where a role's half comes from. Takes name, pair and component. */}}
{{- define "overfill.pullSource" -}}
{{- $source := .pair.pull.source }}
{{- if kindIs "map" $source }}
{{- get $source .component | required (printf "pairs.%s.pull.source has none for %s" .name .component) }}
{{- else }}
{{- $source }}
{{- end }}
{{- end }}

{{/* Ports that a component's pulls go to, as a list. Takes root and component. */}}
{{- define "overfill.pullPorts" -}}
{{- range $name, $pair := .root.Values.pairs }}
{{- with $pair.pull }}
{{- $source := include "overfill.pullSource" (dict "name" $name "pair" $pair "component" $.component) }}
{{- $plain := or (hasPrefix "http://" $source) (and (hasPrefix "oci://" $source) .plainHttp) }}
{{- $host := regexReplaceAll "^[a-z]+://([^/]*).*$" $source "${1}" }}
- {{ regexFind ":[0-9]+$" $host | trimPrefix ":" | default (ternary "80" "443" (not (not $plain))) }}
{{- range .ports }}
- {{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
