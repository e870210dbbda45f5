#!/usr/bin/env python3
"""The paper's claim at a small scale: a decode model that reads the full model's KV cache against the same model alone.

    scripts/pairs/claim.py DATA OUT [--overfill target/release/overfill]

Both arms are pruned from the default pair's full model to the same widths, each by the fit of its own mode, and trained on
the same responses in the same order with a learning rate of its own; then both answer the test questions. DATA is made by
`scripts/data/{fetch,prepare}.py` (docs/data.md). Whatever is in OUT already is taken as done, so a run that was stopped goes
on where it was. Prints a table of each seed and of all, writes OUT/claim.json and draws OUT/claim.svg. Needs matplotlib. The
defaults take about 40 minutes on two cores; figures, and the learning rates' choice, are in docs/claim.md.
"""

import argparse
import json
import pathlib
import statistics
from functools import cached_property

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from steps import Overfill, evenly

# The paper's ratio, 0.45 of both widths cut away: 42 % of the full model's weights are read for each token.
HIDDEN, INTERMEDIATE = 324, 864
ARMS = ("overfill", "decode")
# What they are called, and the full model.
NAMES = {"full": "full model", "overfill": "OverFill", "decode": "pruned only"}
# Chosen on validation (--tune) among 5e-5, 1e-4, 2e-4 and 4e-4.
RATES = {"overfill": 1e-4, "decode": 1e-4}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--overfill", default="target/release/overfill")
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--intermediate", type=int, default=INTERMEDIATE)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=800, help="training prompts that the full model answers")
    parser.add_argument("--responses", type=pathlib.Path, help="training conversations that are there already, instead")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=768)
    parser.add_argument("--validate-every", type=int, default=1000, help="steps")
    parser.add_argument("--samples", type=int, default=512, help="conversations that the pruning is fitted to")
    parser.add_argument("--limit", type=int, default=40, help="test questions of each task")
    parser.add_argument("--loss", default="ce", help="ce is the paper's")
    parser.add_argument("--precision", default="bf16", help="of the products while training: bf16 or f32")
    parser.add_argument("--rates", type=json.loads, default=RATES, help="learning rate of each arm, as JSON")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--tune", type=lambda text: text.split(","), help="instead: the validation loss of each arm after training with each of these learning rates")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    claim = Claim(args)
    claim.tune() if args.tune else claim.run()


class Claim:
    def __init__(self, args):
        self.args = args
        self.overfill = Overfill(args.overfill)
        self.full = self.overfill.full()

    @cached_property
    def train(self):
        """The conversations that both arms are fitted to and trained on."""
        return self.args.responses or self.responses()

    @cached_property
    def starts(self):
        """Each arm's model before training."""
        return {arm: self.start(arm) for arm in ARMS}

    def run(self):
        seeds = range(self.args.seed, self.args.seed + self.args.seeds)
        table = self.table({seed: self.report(seed) for seed in seeds})
        (self.args.out / "claim.json").write_text(json.dumps(table, indent=1) + "\n")
        print_table(table)
        draw(table, self.args.out / "claim.svg")

    def tune(self):
        print("| learning rate | " + " | ".join(ARMS) + " |\n|---|" + "---|" * len(ARMS))
        for rate in self.args.tune:
            runs = [self.args.out / f"tune-{arm}-{rate}" for arm in ARMS]
            for arm, run in zip(ARMS, runs):
                self.trained(run, arm, rate, self.args.seed)
            print(f"| {rate} | " + " | ".join(f"{lowest(run / 'log.jsonl'):.3f}" for run in runs) + " |", flush=True)

    def responses(self):
        """The full model's own answers to prompts of the training set."""
        args, out = self.args, self.args.out
        prompts = evenly(args.data / "train.prompts.jsonl", out / "prompts.jsonl", args.prompts)
        done = out / "responses.done"
        if not done.exists():
            self.overfill.output("answer", "--data", prompts, "--out", out / "responses.jsonl", "--seed", 1)
            done.touch()
        return out / "responses.jsonl"

    def start(self, arm):
        args = self.args
        widths = ("--hidden", args.hidden, "--intermediate", args.intermediate)
        return self.overfill.prune(args.out / f"init-{arm}", self.full, self.train, "--method", "pca", "--fit", arm, "--samples", args.samples, *widths)

    def trained(self, run, arm, rate, seed):
        """An arm's model after training."""
        args = self.args
        how = ("--mode", arm, "--loss", args.loss, "--lr", rate, "--warmup", 0.05, "--precision", args.precision)
        batch = ("--batch-tokens", args.batch_tokens, "--epochs", args.epochs, "--seed", seed, "--cache", args.out / "readings")
        when = ("--valid-samples", 100, "--validate-every", args.validate_every, "--save-every", 100)
        return self.overfill.train(run, self.full, self.starts[arm], self.train, args.data / "valid.answers.jsonl", *how, *batch, *when)

    def report(self, seed):
        args, out, data = self.args, self.args.out, self.args.data
        models = {arm: self.trained(out / f"{arm}-{seed}", arm, args.rates[arm], seed) for arm in ARMS}
        pair = out / f"pair-{seed}"
        self.overfill.make(pair, "pair", "--full", self.full, "--decode", models["overfill"], "--kv", "identity", "--out", pair)
        questions = ("--data", data / "test.jsonl", "--data", data / "test.open.jsonl", "--limit", args.limit)
        against = ("--modes", "overfill,full", "--baseline", models["decode"])
        return json.loads(self.overfill.told(out / f"eval-{seed}.json", "eval", "--pair", pair, *questions, *against, "--json").read_text())

    def table(self, reports):
        seeds = []
        for seed, report in reports.items():
            ours, full, alone = report["arms"]
            comparison = next(c for c in report["comparisons"] if c["baseline"] == alone["name"])
            arm = lambda a: {"loss": a["mean"]["loss"]["value"], "score": a["mean"]["score"]["value"], "tasks": {t: f["score"]["value"] for t, f in a["tasks"].items()}}
            seeds.append({"seed": seed, "overfill": arm(ours), "decode": arm(alone), "full": arm(full), **{k: comparison[k] for k in ("improvement", "improvement_by_task", "gap_closed")}})
        means = {}
        for key in ("improvement", "improvement_by_task", "gap_closed"):
            told = [s[key] for s in seeds]
            # A ratio to a score of 0 is none. The interval is the widest that the seeds' own (bootstrap over samples) make together.
            if all(t[k] is not None for t in told for k in ("value", "low", "high")):
                mean, low, high = statistics.mean(t["value"] for t in told), min(t["low"] for t in told), max(t["high"] for t in told)
                means[key] = {"mean": mean, "low": low, "high": high}
            else:
                means[key] = None
        settings = {k: getattr(self.args, k) for k in ("hidden", "intermediate", "epochs", "batch_tokens", "loss", "precision", "rates", "limit")}
        return {"settings": settings, "seeds": seeds, "all": means}


def lowest(log):
    """The least cross-entropy of a run's validations."""
    events = map(json.loads, log.read_text().splitlines())
    return min(event["ce"] for event in events if event["event"] == "validation")


def print_table(table):
    tasks = sorted(table["seeds"][0]["full"]["tasks"])
    print("| seed | arm | loss | " + " | ".join(tasks) + " | mean score |")
    print("|" + "---|" * (len(tasks) + 4))
    for seed in table["seeds"]:
        for arm in NAMES:
            told = seed[arm]
            scores = " | ".join(f"{told['tasks'][t]:.2f}" for t in tasks)
            print(f"| {seed['seed']} | {NAMES[arm]} | {told['loss']:.3f} | {scores} | {told['score']:.3f} |")
    names = {
        "improvement": "OverFill over pruned only, mean score",
        "improvement_by_task": "the same, mean over the tasks of each one's improvement",
        "gap_closed": "of the way from pruned only to the full model",
    }
    print()
    for key, name in names.items():
        of_all = table["all"][key]
        if of_all is None:
            print(f"{name}: not defined, since pruned only scored 0 with a seed or in a resample")
            continue
        each = ", ".join(f"{s[key]['value']:+.0%}" for s in table["seeds"])
        print(f"{name}: {of_all['mean']:+.0%} [{of_all['low']:+.0%}, {of_all['high']:+.0%}] (seeds: {each})")


def draw(table, path):
    """Scores by task: the mean over the seeds, and from the least to the most of them."""
    seeds, tasks = table["seeds"], sorted(table["seeds"][0]["full"]["tasks"])
    figure, axes = plt.subplots(figsize=(7, 4))
    for i, (arm, name) in enumerate(NAMES.items()):
        each = [[seed[arm]["tasks"][task] for seed in seeds] for task in tasks] + [[seed[arm]["score"] for seed in seeds]]
        means = [statistics.mean(scores) for scores in each]
        spread = [[mean - min(scores) for mean, scores in zip(means, each)], [max(scores) - mean for mean, scores in zip(means, each)]]
        axes.bar([x + (i - 1) * 0.27 for x in range(len(each))], means, 0.25, yerr=spread, capsize=2, label=name)
    axes.set_xticks(range(len(tasks) + 1), [*tasks, "mean"])
    axes.set(ylabel="score", ylim=(0, 1))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
