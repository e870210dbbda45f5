#!/usr/bin/env python3
"""What the models of a pair write: a table of greedy answers to twelve prompts, each of another kind.

    scripts/pairs/answers.py [--overfill target/release/overfill] [--pair PAIR …] [--max-tokens 60]

The prompts were chosen before any model had answered them, and are none that a model here was trained on. Prints Markdown: the full
model alone, then each pair's two models together (the default pair, unless others are named).
"""

import argparse
import subprocess

PROMPTS = [
    "What is the largest ocean on Earth?",
    "Why do we have seasons?",
    "How do I boil an egg?",
    "Write an email asking my boss for a day off.",
    "Give me a simple recipe for pancakes.",
    "Write a Python function that returns the larger of two numbers.",
    "How can I sleep better?",
    "Summarise in one sentence: The Nile flows north through eleven countries to the Mediterranean Sea. It is the longest river in Africa, and most of Egypt's people live along its banks.",
    "Write a short poem about the sea.",
    "Rewrite this more politely: Send me the report now.",
    "Name five things to pack for a trip to the mountains.",
    "Anna moved from Oslo to Lisbon in 2019 and works as a nurse. Where does Anna live now?",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overfill", default="target/release/overfill")
    parser.add_argument("--pair", action="append", default=[])
    parser.add_argument("--max-tokens", type=int, default=60)
    args = parser.parse_args()
    pairs = args.pair or ["smollm2-135m"]

    def answer(prompt, pair, quality):
        command = [args.overfill, "generate", prompt, "--pair", pair, "--quality", quality, "--temperature", "0", "--max-tokens", str(args.max_tokens)]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
        return cell(told.stdout, "length" in told.stderr)

    heads = pairs if len(pairs) > 1 else ["full model reads, decode model writes"]
    print("| | full model alone | " + " | ".join(heads) + " |\n|---|---|" + "---|" * len(pairs))
    for prompt in PROMPTS:
        row = [prompt, answer(prompt, pairs[0], "full"), *(answer(prompt, pair, "overfill") for pair in pairs)]
        print("| " + " | ".join(row) + " |", flush=True)


def cell(text, cut):
    """An answer in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|") + (" …" if cut else "")


if __name__ == "__main__":
    main()
