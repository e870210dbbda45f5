"""Prometheus' own parser on the metrics of every process; prints how many samples each tells, as JSON."""

import json
import sys
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

told = []
for url in sys.argv[1:]:
    families = list(text_string_to_metric_families(urllib.request.urlopen(url, timeout=10).read().decode()))
    for family in families:
        assert family.type in ("counter", "gauge", "histogram"), (family.name, family.type)
        assert family.documentation and family.samples, family.name
        if family.type != "histogram":
            continue
        # Of each set of labels the buckets grow, and the last has all.
        buckets, counts = {}, {}
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
            if sample.name.endswith("_bucket"):
                buckets.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
            elif sample.name.endswith("_count"):
                counts[labels] = sample.value
        assert buckets.keys() == counts.keys(), family.name
        for labels, found in buckets.items():
            found.sort()
            assert found[-1] == (float("inf"), counts[labels]), family.name
            assert all(a[1] <= b[1] for a, b in zip(found, found[1:])), family.name
    told.append(sum(len(family.samples) for family in families))
print(json.dumps(told))
