{{/*
What the nodes of each component are scaled by: a figure of `targets`, its metric's name for an HPA (files/prometheus-adapter.yaml makes it)
and its query, whose SELECTOR becomes that of the workload's pods. All are sums over the pods, so a target is what one pod may have.
*/}}
{{- define "overfill.figures" -}}
- component: router
  figure: requests
  metric: overfill_requests
  query: sum(overfill_router_held{what="requests",SELECTOR})
- component: prefill
  figure: busy
  metric: overfill_prefill_busy
  query: sum(rate(overfill_step_seconds_sum{engine="prefill",SELECTOR}[1m]))
- component: prefill
  figure: waiting
  metric: overfill_prefill_waiting
  query: sum(avg_over_time(vllm:num_requests_waiting{engine="prefill",SELECTOR}[1m]))
- component: decode
  figure: kvShare
  metric: overfill_decode_kv_share
  query: sum(vllm:kv_cache_usage_perc{engine="decode",SELECTOR})
- component: decode
  figure: sequences
  metric: overfill_decode_sequences
  query: sum(vllm:num_requests_running{engine="decode",SELECTOR})
{{- end }}
