#!/usr/bin/env python3
"""Draws the roofline of both phases from what the engine measured of itself.

    pip install matplotlib
    overfill bench engine --threads 2 --batch 1,8,32 --runs 3 --profile --json > profile.json
    docs/performance/roofline.py profile.json docs/performance/roofline.svg

A point is one part of a forward pass: how many operations it makes of each byte of weights and KV cache that it reads, and how
many it makes in a second. The lines are the machine's own peaks, measured in the same run: reading memory, and f32 multiply-adds.
Products of rounded integers can lie above the f32 line.
"""
import json
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "roofline"
import matplotlib.pyplot as plt

MATRICES = {"qkv", "output", "gateup", "down", "head", "attention"}
COLOURS = {"prefill": "tab:red", 1: "tab:blue", 8: "tab:green", 32: "tab:purple"}


def main(source, target):
    rows = [json.loads(line) for line in open(source)]
    rows = [row for row in rows if "part" in row]
    threads = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads]
    read = max(row["peak_gigabytes_per_second"] for row in rows)
    multiply = max(row["peak_gigaflops_per_second"] for row in rows)
    figure, axes = plt.subplots(figsize=(8, 5))
    edge = multiply / read
    axes.loglog([0.5, edge], [0.5 * read, multiply], "k-", lw=1)
    axes.loglog([edge, 3000], [multiply, multiply], "k-", lw=1)
    axes.text(0.6, 0.6 * read * 1.25, f"memory, {read:.0f} GB/s", rotation=32, fontsize=8)
    axes.text(400, multiply * 0.8, f"f32, {multiply:.0f} GFLOP/s", fontsize=8, va="top")
    seen = set()
    for row in rows:
        if row["part"] not in MATRICES or row["gigabytes_per_second"] <= 0:
            continue
        case = "prefill" if row["phase"] == "prefill" else row["batch"]
        if row["phase"] == "prefill" and row["part"] == "head":
            continue  # one row of logits: it is a decode step's head
        label = "prefill" if case == "prefill" else f"decode, batch {case}"
        intensity = row["gigaflops_per_second"] / row["gigabytes_per_second"]
        axes.scatter(intensity, row["gigaflops_per_second"], s=20 + 400 * row["share"], alpha=0.6, color=COLOURS.get(case, "tab:gray"),
                     label=None if label in seen else label)
        seen.add(label)
        axes.annotate(row["part"], (intensity, row["gigaflops_per_second"]), fontsize=6, xytext=(4, 2), textcoords="offset points")
    axes.set_xlabel("operations per byte of weights and KV cache read")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{rows[0]['model']}, {threads} threads (area: share of the time)", fontsize=10)
    legend = axes.legend(fontsize=8, loc="lower right")
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    axes.grid(True, which="major", lw=0.3)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
