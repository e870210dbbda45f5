#!/usr/bin/env python3
"""Leave out answers that go round in circles: a small model that is sampled from does so now and then.

    scripts/data/clean.py IN.jsonl OUT.jsonl

An answer goes where less than 60 % of its runs of four words are different ones.
"""

import json
import sys


def turns_in_circles(answer):
    words = answer.split()
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(runs) >= 12 and len(set(runs)) < 0.6 * len(runs)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    kept = left_out = 0
    with open(sys.argv[1], encoding="utf-8") as answers, open(sys.argv[2], "w", encoding="utf-8") as out:
        for line in answers:
            # A line that is still being written has no end.
            if not line.endswith("\n"):
                break
            answer = json.loads(line)["messages"][-1]["content"].strip()
            if answer and not turns_in_circles(answer):
                out.write(line)
                kept += 1
            else:
                left_out += 1
    print(f"{kept} kept, {left_out} left out")


main()
