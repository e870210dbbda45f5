#!/usr/bin/env python3
"""Where the bytes of a decode model are best spent: short trainings of models that read about as many bytes a token.

    scripts/pairs/shapes.py TRAIN.jsonl VALID.jsonl OUT [--shape HIDDENxMLP:LAYERS:HEAD] [--shape depthN:LAYERS:HEAD] …

A shape is the width of the residual stream and of the MLP, or `depth` and the number of layers that are kept at full width; then
the format of the layers' matrices, and that of the embedding and the head. Each is pruned, fitted, and trained on the same batches
in the same order, rounded as it will be stored. Prints a table, best first, and draws the divergence from the full model over the
bytes that are read for a token into OUT/shapes.svg; with --speed also how fast each writes, in turns (nothing else should run).
Needs matplotlib. Whatever is in OUT already is taken as done.
"""

import argparse
import json
import pathlib
import statistics

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from steps import Overfill

# Bits of a weight, with its block's scale.
BITS = {"q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q8_0": 8.5}
# Of SmolLM2-135M: all of some 54 MB, but for the last two, which show what more and fewer bytes are worth.
SHAPES = [
    "576x608:q4_0:q5_1", "576x784:q4_0:q4_0", "576x416:q5_0:q5_1", "504x864:q4_0:q5_1", "432x1216:q4_0:q5_1", "depth16:q4_0:q5_1",
    "576x832:q4_0:q5_1", "576x416:q4_0:q5_1",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=pathlib.Path, help="training conversations")
    parser.add_argument("valid", type=pathlib.Path, help="validation conversations")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--overfill", default="target/release/overfill")
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--samples", type=int, default=400, help="conversations that the pruning is fitted to")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-tokens", type=int, default=1536)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    overfill = Overfill(args.overfill)
    full = overfill.full()
    results = [(shape, *learned(overfill, full, shape, args)) for shape in args.shape or SHAPES]
    speeds = {shape: [] for shape, *_ in results}
    for turn in range(5 if args.speed else 0):
        for shape, stored, *_ in results:
            speeds[shape].append(speed(overfill, stored, turn, args))

    figure, axes = plt.subplots(figsize=(7, 4.2))
    print("| shape | MB a token | KL before | KL after | cross-entropy after | decode tokens/s |\n|---|---|---|---|---|---|")
    for shape, stored, first, last in sorted(results, key=lambda result: result[3]["kl"]):
        read = read_bytes(json.loads((args.out / slug(shape) / "init" / "config.json").read_text()), shape) / 1e6
        rate = f"{statistics.median(speeds[shape]):.0f} ({min(speeds[shape]):.0f} to {max(speeds[shape]):.0f})" if args.speed else ""
        print(f"| {shape} | {read:.1f} | {first['kl']:.3f} | {last['kl']:.3f} | {last['ce']:.3f} | {rate} |")
        axes.plot(read, last["kl"], "o")
        axes.annotate(shape, (read, last["kl"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="weights read for a token, MB", ylabel="divergence from the full model, nats a token")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.out / "shapes.svg", metadata={"Date": None})


def slug(shape):
    return shape.replace(":", "-")


def learned(overfill, full, shape, args):
    """The file of a shape's model after training, and its first and last validation."""
    widths, layers, head = shape.split(":")
    folder = args.out / slug(shape)
    folder.mkdir(exist_ok=True)
    if widths.startswith("depth"):
        cut = ("--method", "depth", "--layers", widths.removeprefix("depth"))
    else:
        hidden, intermediate = widths.split("x")
        cut = ("--method", "pca", "--intermediate", intermediate)
        # A stream that is kept whole keeps embedding and head one matrix.
        if int(hidden) != json.loads((full.parent / "pair.json").read_text())["full"]["hidden_size"]:
            cut += ("--hidden", hidden)
    init = overfill.prune(folder / "init", full, args.train, *cut, "--samples", args.samples)
    formats = ("--quantise", layers, "--embedding", head, "--head", head)
    how = ("--precision", "bf16", "--ce-weight", 0, "--lr", args.lr, "--warmup", 0.05, "--seed", 1, "--threads", args.threads)
    batch = ("--batch-tokens", args.batch_tokens, "--steps", args.steps, "--cache", args.out / "readings")
    when = ("--valid-samples", 120, "--validate-every", max(args.steps // 3, 1))
    model = overfill.train(folder / "run", full, init, args.train, args.valid, *formats, *how, *batch, *when)
    stored = overfill.make(
        folder / "model.gguf", "export", "--model", model, "--format", "gguf", *formats, "--out", folder / "model.gguf"
    )
    events = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    validations = [event for event in events if event["event"] == "validation"]
    return stored, validations[0], validations[-1]


def read_bytes(config, shape):
    """Bytes of weights that a token reads: all layers and the head."""
    _, layers, head = shape.split(":")
    hidden, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_dim = config.get("head_dim") or hidden // heads
    layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
    return (config["num_hidden_layers"] * layer * BITS[layers] + config["vocab_size"] * hidden * BITS[head]) / 8


def speed(overfill, stored, turn, args):
    """Decode tokens a second of one sequence, the median of one turn."""
    told = overfill.told(
        stored.parent / f"speed-{turn}.json", "bench", "engine", "--phases", "decode", "--batch", 1, "--context", 256,
        "--model", stored, "--threads", args.threads, "--json",
    )  # fmt: skip
    return json.loads(told.read_text())["tokens_per_second"]["median"]


if __name__ == "__main__":
    main()
