{{/*
What the nodes of each component are scaled by: a figure of `targets`, its metric's name for an HPA (files/prometheus-adapter.yaml makes it)
and its query, whose SELECTOR becomes that of the workload's pods, or of all routers where `of` says so. All are sums, so a target is what
one pod of the workload may have.
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
  of: router
  query: sum(avg_over_time(overfill_waiting_for_nodes{role="prefill",SELECTOR}[1m]))
- component: prefill
  figure: unreadTokens
  metric: overfill_prefill_unread_tokens
  query: sum(avg_over_time(overfill_unread_tokens{engine="prefill",SELECTOR}[1m]))
- component: decode
  figure: kvShare
  metric: overfill_decode_kv_share
  query: sum(overfill_kv_promised_share{engine="decode",SELECTOR})
- component: decode
  figure: sequences
  metric: overfill_decode_sequences
  query: sum(vllm:num_requests_running{engine="decode",SELECTOR})
{{- end }}
