#!/usr/bin/env python3
"""What a decode model gives for its speed: decode tokens/s of one sequence against the mean score over tasks.

    scripts/pairs/speed_quality.py OUT --data test.jsonl --pair "OverFill=DIR" [--pair …] [--alone "pruned only=MODEL"] …

Each --pair is scored as it is served, the full model reading and the decode model writing; each --alone (a Hugging Face folder or
a GGUF file) reads and writes by itself; the first pair's full model is scored too. Speeds are those of the models that write, on
this machine, so nothing else should run; they are taken in turns, so that what slows the machine for a while slows all of them.
Draws OUT/speed-quality.svg and prints a table. Needs matplotlib. Scores and speeds that are in OUT already are not measured again.
"""

import argparse
import json
import pathlib
import statistics

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from steps import Overfill


def named(text):
    name, _, path = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text}: NAME=PATH")
    return name, pathlib.Path(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, action="append", required=True)
    parser.add_argument("--pair", type=named, action="append", required=True)
    parser.add_argument("--alone", type=named, action="append", default=[])
    parser.add_argument("--overfill", default="target/release/overfill")
    parser.add_argument("--limit", type=int, default=100, help="questions of each task")
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache when decode begins")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="turns in which speeds are measured")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    measure = Measure(args)

    writers = []
    for i, (name, pair) in enumerate(args.pair):
        manifest = json.loads((pair / "pair.json").read_text())
        modes = ("overfill", "full") if i == 0 else ("overfill",)
        alone = args.alone if i == 0 else []
        arms = measure.scores(name, pair, modes, alone)
        writers.append((name, pair, manifest["decode"], arms[0]))
        if i == 0:
            writers.append(("full model", pair, manifest["full"], arms[1]))
            for (other, model), arm in zip(alone, arms[2:]):
                own = {"path": model.resolve(), "weights": "native"}
                writers.append((other, pair, own, arm))
    rounds = [[measure.speed(turn, name, pair, model) for name, pair, model, _ in writers] for turn in range(args.rounds)]
    points = []
    for (name, _, _, arm), speeds in zip(writers, zip(*rounds)):
        points.append((name, {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)}, arm))
    points.sort(key=lambda point: point[1]["median"])

    print("| who writes | decode tokens/s (least to most) | score | 95 % | loss |\n|---|---|---|---|---|")
    figure, axes = plt.subplots(figsize=(7, 4.4))
    for name, speed, arm in points:
        score, loss = arm["mean"]["score"], arm["mean"]["loss"]["value"]
        print(f"| {name} | {speed['median']:.0f} ({speed['min']:.0f} to {speed['max']:.0f}) | {score['value']:.3f} | {score['low']:.3f} to {score['high']:.3f} | {loss:.3f} |")
        spread = lambda value, low, high: [[value - low], [high - value]]
        axes.errorbar(
            speed["median"], score["value"], fmt="o", capsize=2, xerr=spread(speed["median"], speed["min"], speed["max"]),
            yerr=spread(score["value"], score["low"], score["high"]),
        )  # fmt: skip
        axes.annotate(name, (speed["median"], score["value"]), xytext=(6, 6), textcoords="offset points", fontsize=9)
    axes.set(xlabel="decode, tokens/s of one sequence", ylabel="mean score over the tasks", xlim=(0, None), ylim=(0, None))
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.out / "speed-quality.svg", metadata={"Date": None})


class Measure:
    def __init__(self, args):
        self.args = args
        self.overfill = Overfill(args.overfill)

    def scores(self, name, pair, modes, alone):
        """The arms of `overfill eval`, in this order."""
        args = self.args
        data = [part for file in args.data for part in ("--data", file)]
        baselines = [part for _, model in alone for part in ("--baseline", model)]
        options = ("--pair", pair, *data, "--modes", ",".join(modes), "--limit", args.limit, *baselines, "--json")
        return json.loads(self.overfill.told(args.out / f"score-{slug(name)}.json", "eval", *options).read_text())["arms"]

    def speed(self, turn, name, pair, model):
        """Its decode tokens a second, the median of one turn."""
        args = self.args
        options = ("--model", pair / model["path"], "--weights", model["weights"], "--threads", args.threads, "--context", args.context)
        told = self.overfill.told(args.out / f"speed-{slug(name)}-{turn}.json", "bench", "engine", "--phases", "decode", "--batch", 1, *options, "--json")
        return json.loads(told.read_text())["tokens_per_second"]["median"]


def slug(name):
    return "".join(c if c.isalnum() else "-" for c in name)


if __name__ == "__main__":
    main()
