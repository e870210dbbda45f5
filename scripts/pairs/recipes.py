#!/usr/bin/env python3
"""Four ways to make a decode model, of the same size, with the same budget: the reference's, ours, and each half of ours.

    scripts/pairs/recipes.py RESPONSES.jsonl VALID.jsonl OUT [--overfill target/release/overfill]

`minitron` and `pca` prune; `ce` and `distill` are the losses of training. All see the same batches in the same order, with the
same learning rate unless --rates says otherwise. Draws the validation's cross-entropy over response tokens into OUT/recipes.svg
and prints a table. Needs matplotlib. Whatever is in OUT already is taken as done.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from steps import Overfill

METHODS, LOSSES = ("minitron", "pca"), ("ce", "distill")
NAMES = {("minitron", "ce"): "minitron + ce (the reference)", ("pca", "distill"): "pca + distill (ours)"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("responses", type=pathlib.Path, help="training conversations")
    parser.add_argument("valid", type=pathlib.Path, help="validation conversations")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--overfill", default="target/release/overfill")
    parser.add_argument("--hidden", type=int, default=324)
    parser.add_argument("--intermediate", type=int, default=864)
    parser.add_argument("--samples", type=int, default=512, help="conversations that the pruning is fitted to")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-tokens", type=int, default=1536)
    parser.add_argument("--precision", default="bf16", help="of the products while training: bf16 or f32")
    parser.add_argument("--rates", type=json.loads, default={}, help='learning rates as JSON, e.g. {"minitron": 4e-4}')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    overfill = Overfill(args.overfill)
    full = overfill.full()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    print("| recipe | before | after | divergence from the full model | tokens |\n|---|---|---|---|---|")
    for method in METHODS:
        widths = ("--hidden", args.hidden, "--intermediate", args.intermediate, "--samples", args.samples)
        init = overfill.prune(args.out / method, full, args.responses, "--method", method, *widths)
        for loss in LOSSES:
            run = args.out / f"{method}-{loss}"
            rate = ("--loss", loss, "--lr", args.rates.get(method, 1.5e-4), "--warmup", 0.05, "--precision", args.precision)
            batch = ("--batch-tokens", args.batch_tokens, "--steps", args.steps, "--seed", 1, "--cache", args.out / "readings")
            when = ("--valid-samples", 100, "--validate-every", max(args.steps // 8, 1))
            overfill.train(run, full, init, args.responses, args.valid, *rate, *batch, *when)
            tokens, validations = curve(run / "log.jsonl")
            name = NAMES.get((method, loss), f"{method} + {loss}")
            axes.plot(tokens, [v["ce"] for v in validations], marker=".", label=name)
            first, last = validations[0], validations[-1]
            print(f"| {name} | {first['ce']:.3f} | {last['ce']:.3f} | {last['kl']:.3f} | {tokens[-1]:,} |")
    axes.set(xlabel="response tokens learned from", ylabel="validation cross-entropy, nats a token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.out / "recipes.svg", metadata={"Date": None})


def curve(log):
    """Response tokens before each validation, and the validations."""
    tokens, at, validations = 0, [], []
    for event in map(json.loads, log.read_text().splitlines()):
        if event["event"] == "step":
            tokens += event["tokens"]
        elif event["event"] == "validation":
            at.append(tokens)
            validations.append(event)
    return at, validations


if __name__ == "__main__":
    main()
