{{/* Puts what `over` says over `base`, in place: maps key by key, all else whole. */}}
{{- define "overfill.overlay" -}}
{{- $base := .base }}
{{- range $key, $value := .over }}
{{- if and (kindIs "map" $value) (kindIs "map" (get $base $key)) }}
{{- $_ := include "overfill.overlay" (dict "base" (get $base $key) "over" $value) }}
{{- else }}
{{- $_ := set $base $key $value }}
{{- end }}
{{- end }}
{{- end }}

{{/* Adds a workload to `.out.workloads`: its component, its pool, its name, the pairs that it serves, and its settings. */}}
{{- define "overfill.workload" -}}
{{- range .pairs }}
{{- if not (hasKey $.root.Values.pairs .) }}
{{- fail (printf "%s.pools.%s names the pair %s, which is not in `pairs`" $.component $.pool .) }}
{{- end }}
{{- end }}
{{- $settings := deepCopy (omit (get .root.Values .component) "pools") }}
{{- $_ := include "overfill.overlay" (dict "base" $settings "over" (omit .over "pair" "pairs")) }}
{{- $drain := deepCopy .root.Values.drain }}
{{- $_ := include "overfill.overlay" (dict "base" $drain "over" $settings.drain) }}
{{- $_ := set $settings "drain" $drain }}
{{- $name := include "overfill.name" .root }}
{{- $name = ternary (printf "%s-%s-%s" $name .component .pool) (printf "%s-%s" $name .component) (ne .pool "") }}
{{- $autoscaled := $settings.autoscaling.enabled }}
{{- $least := ternary $settings.autoscaling.minReplicas $settings.replicas $autoscaled | int }}
{{- $workload := dict "component" .component "pool" .pool "name" $name "pairs" .pairs "settings" $settings "least" $least }}
{{- $_ := set .out "workloads" (append .out.workloads $workload) }}
{{- end }}

{{/* Sets `.out.workloads`: the router, each pool of prefill nodes, each pool of decode nodes. */}}
{{- define "overfill.workloads" -}}
{{- $root := .root }}
{{- $out := .out }}
{{- $pairs := keys $root.Values.pairs | sortAlpha }}
{{- if not $pairs }}{{ fail "name at least one pair, and where its weights lie: `pairs` in the values" }}{{ end }}
{{- $_ := set $out "workloads" list }}
{{- $_ := include "overfill.workload" (dict "root" $root "out" $out "component" "router" "pool" "" "pairs" $pairs "over" dict) }}
{{- range $pool, $over := $root.Values.prefill.pools }}
{{- $_ := include "overfill.workload" (dict "root" $root "out" $out "component" "prefill" "pool" $pool "pairs" $over.pairs "over" $over) }}
{{- else }}
{{- $_ := include "overfill.workload" (dict "root" $root "out" $out "component" "prefill" "pool" "" "pairs" $pairs "over" dict) }}
{{- end }}
{{- range $pool, $over := $root.Values.decode.pools }}
{{- $its := list $over.pair }}
{{- $_ := include "overfill.workload" (dict "root" $root "out" $out "component" "decode" "pool" $pool "pairs" $its "over" $over) }}
{{- else }}
{{- range $pairs }}
{{- $_ := include "overfill.workload" (dict "root" $root "out" $out "component" "decode" "pool" . "pairs" (list .) "over" dict) }}
{{- end }}
{{- end }}
{{- end }}
