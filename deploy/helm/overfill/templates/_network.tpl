{{/*
The one table of who reaches what. A row is a port of a component and those who may reach it: components of this release, or a list of
peers in the values (empty: anyone). The containers' ports and both sides of the NetworkPolicies are made of it.
*/}}
{{- define "overfill.table" -}}
- { component: router, name: http, port: 8000, peers: clients, from: [test] }
- { component: router, name: grpc, port: 8001, peers: clients, from: [test] }
- { component: router, name: admin, port: 9100, peers: scrapers }
- { component: prefill, name: grpc, port: 7001, from: [router] }
- { component: prefill, name: admin, port: 9100, peers: scrapers }
- { component: decode, name: grpc, port: 7002, from: [router, prefill] }
- { component: decode, name: admin, port: 9100, peers: scrapers }
- { component: etcd, name: client, port: 2379, from: [router, prefill, decode] }
- { component: etcd, name: peer, port: 2380, from: [etcd] }
- { component: etcd, name: metrics, port: 2381, peers: scrapers }
{{- end }}

{{/* Rows of the table for a component's own ports. */}}
{{- define "overfill.ports" -}}
{{- range include "overfill.table" . | fromYamlArray }}
{{- if eq .component $ }}
- {{ toJson . }}
{{- end }}
{{- end }}
{{- end }}

{{/* The component whose pods a component's reach by NCCL; empty where none do. */}}
{{- define "overfill.ncclPeer" -}}
{{- if and .root.Values.prefill.nccl .root.Values.decode.nccl }}
{{- if eq .component "prefill" }}decode{{ else if eq .component "decode" }}prefill{{ end }}
{{- end }}
{{- end }}
