"""Commands of `overfill` whose results are kept: what is there already is not made again, so a script that was stopped goes on."""

import pathlib
import subprocess
import sys


class Overfill:
    def __init__(self, binary):
        self.binary = binary

    def output(self, *command):
        """What a command prints."""
        return subprocess.run([self.binary, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    def make(self, target, *command):
        """`target`, made by a command unless it is there. All of them make it whole or not at all, or go on."""
        if not target.exists():
            print("+ overfill", *command, file=sys.stderr)
            self.output(*command)
        return target

    def told(self, target, *command):
        """`target`, holding what a command prints."""
        if not target.exists():
            text = self.output(*command)
            target.write_text(text + "\n")
        return target

    def full(self):
        """The full model of the default pair."""
        return pathlib.Path(self.output("fetch")) / "full.gguf"

    def prune(self, target, full, data, *options):
        """A model that was pruned and fitted on conversations of `data`."""
        return self.make(target, "prune", "--full", full, "--calibration", data, "--held-out", 20, "--out", target, *options)

    def train(self, run, full, init, data, valid, *options):
        """The model of a training run."""
        self.make(run / "model", "train", "--full", full, "--init", init, "--data", data, "--valid", valid, "--out", run, *options)
        return run / "model"


def evenly(source, target, count):
    """`count` lines of a file, from all parts of it, so that every kind is among them."""
    if not target.exists():
        lines = source.read_text().splitlines(keepends=True)
        count = min(count, len(lines))
        target.write_text("".join(lines[i * len(lines) // count] for i in range(count)))
    return target
