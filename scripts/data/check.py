#!/usr/bin/env python3
"""Prove that training, validation and test share no document, and no run of twelve words of one.

    scripts/data/check.py OUT

Reads every OUT/{train,valid,test}*.jsonl. Words are compared where a line's document is a text that a person wrote, which
facts made up and everyday questions are not.
"""

import json
import pathlib
import sys

from sources import key, shingles

MADE_UP = ("facts: ", "everyday: ")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    documents, words = {}, {}
    for split in ["train", "valid", "test"]:
        files = sorted(pathlib.Path(sys.argv[1]).glob(f"{split}*.jsonl"))
        documents[split], words[split], lines = set(), {}, 0
        for file in files:
            for number, line in enumerate(file.open(encoding="utf-8"), 1):
                line = json.loads(line)
                named = line["document"] if isinstance(line["document"], list) else [line["document"]]
                documents[split] |= {key(name) for name in named}
                lines += 1
                if not named[0].startswith(MADE_UP):
                    asked = [message["content"] for message in line["messages"] if message["role"] == "user"]
                    # By paragraphs, so that no run of words goes from a prompt's wording into the text.
                    for text in "\n\n".join(asked + line.get("answers", [])).split("\n\n"):
                        words[split] |= dict.fromkeys(shingles(text), f"{file.name}, line {number}")
        print(f"{split}: {lines} lines in {len(files)} files, {len(documents[split])} documents, {len(words[split])} runs of words")
    failed = False
    for a, b in [("train", "valid"), ("train", "test"), ("valid", "test")]:
        for what, shared in [("document", documents[a] & documents[b]), ("run of words", words[a].keys() & words[b].keys())]:
            for one in sorted(shared)[:5]:
                said = f"{words[a][one]} and {words[b][one]}: {' '.join(one)}" if what == "run of words" else one
                print(f"{a} and {b} share the {what} {said}")
            failed |= bool(shared)
    sys.exit("the splits are not apart" if failed else None)


main()
