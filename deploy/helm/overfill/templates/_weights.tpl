{{/* The folders of a workload's pairs, as the binaries take them. */}}
{{- define "overfill.pairFolders" -}}
{{- $folders := list }}
{{- range $name := .workload.pairs }}
{{- $pair := get $.root.Values.pairs $name }}
{{- $path := $pair.path | default (ternary "pair" "" (and (hasKey $pair "images") (not (dig "images" "copy" false $pair)))) }}
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
{{- if and $pair.images $pair.volume }}{{ fail (printf "pairs.%s has images and a volume: give one of the two" $name) }}{{ end }}
- name: pair-{{ $name }}
{{- if $pair.volume }}
  {{- toYaml $pair.volume | nindent 2 }}
{{- else if dig "images" "copy" false $pair }}
  emptyDir: {}
{{- else if $pair.images }}
  image:
    reference: {{ include "overfill.pairImage" (dict "name" $name "pair" $pair "component" $.workload.component) }}
    pullPolicy: {{ $pair.images.pullPolicy | default "IfNotPresent" }}
{{- else }}
{{- fail (printf "pairs.%s says neither `volume` nor `images`: where do its weights lie?" $name) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "overfill.pairImage" -}}
{{- get .pair.images .component | required (printf "pairs.%s.images has no image for %s" .name .component) }}
{{- end }}

{{/* Where images cannot be mounted, their content is copied into the pod. */}}
{{- define "overfill.pairCopies" -}}
{{- range $name := .workload.pairs }}
{{- $pair := get $.root.Values.pairs $name }}
{{- if dig "images" "copy" false $pair }}
- name: copy-{{ $name }}
  image: {{ include "overfill.pairImage" (dict "name" $name "pair" $pair "component" $.workload.component) }}
  imagePullPolicy: {{ $pair.images.pullPolicy | default "IfNotPresent" }}
  command: ["cp", "-r", "/pair/.", "/to/"]
  resources:
    requests: { cpu: 100m, memory: 64Mi }
    limits: { memory: 256Mi }
  securityContext:
    {{- toYaml $.root.Values.containerSecurityContext | nindent 4 }}
  volumeMounts:
    - name: pair-{{ $name }}
      mountPath: /to
{{- end }}
{{- end }}
{{- end }}
