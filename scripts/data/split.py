#!/usr/bin/env python3
"""Split conversations that a model made up into training, validation and test, by conversation.

    scripts/data/split.py MADE.jsonl OUT

Of 100 conversations 1 is for validation and 2 are for test, by a hash of their names. Out of training go those of which the user's
words share a run of twelve words with a held-out one, out of validation those that share one with the test. Writes
OUT/{train,valid,test}.self.jsonl.
"""

import json
import pathlib
import sys

from sources import part, shingles

PARTS = {"test": 2, "valid": 1}


def split_of(document):
    at = part(document)
    for split, parts in PARTS.items():
        if at < parts:
            return split
        at -= parts
    return "train"


def asked(line):
    return [run for message in line["messages"] if message["role"] == "user" for run in shingles(message["content"])]


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    out = pathlib.Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    conversations = {}
    with open(sys.argv[1], encoding="utf-8") as made:
        for line in made:
            # A line that is still being written has no end.
            if not line.endswith("\n"):
                break
            conversations.setdefault(json.loads(line)["document"], []).append(line)
    held_out, written = set(), {}
    for split in [*PARTS, "train"]:
        taken = {name: lines for name, lines in conversations.items() if split_of(name) == split}
        runs = {name: {run for line in lines for run in asked(json.loads(line))} for name, lines in taken.items()}
        kept = [name for name in taken if not runs[name] & held_out]
        if split != "train":
            held_out.update(*(runs[name] for name in kept))
        lines = [line for name in kept for line in taken[name]]
        (out / f"{split}.self.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split}: {len(kept)} conversations of {len(lines)} answers; {len(taken) - len(kept)} left out, too near to one held out")


main()
