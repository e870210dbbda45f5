#!/usr/bin/env python3
"""The loss of given answers as a running cluster serves them, to compare with what `overfill train` and `overfill eval` report.

    scripts/pairs/served_loss.py DATA.jsonl [--url http://127.0.0.1:8000] [--model NAME] [--quality overfill] [--limit 200]

Each answer is forced token by token (`forced_token_ids`) and its log-probabilities are summed, without the first token, which
the full model writes. Prints nats a token. Needs nothing but Python.
"""

import argparse
import concurrent.futures
import json
import urllib.request


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model")
    parser.add_argument("--quality", default="overfill")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--end", default="<|im_end|>", help="the token that ends a turn")
    parser.add_argument("--at-once", type=int, default=8)
    args = parser.parse_args()

    def post(path, **body):
        if args.model:
            body["model"] = args.model
        request = urllib.request.Request(args.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def plain(text):
        return post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]

    end = plain(args.end)

    def scored(line):
        conversation = json.loads(line)
        *messages, answer = conversation["messages"]
        prompt = post("/tokenize", messages=messages)["tokens"]
        response = plain(answer["content"]) + (end if conversation.get("complete", True) else [])
        told = post(
            "/v1/completions", prompt=prompt, forced_token_ids=response, max_tokens=len(response), ignore_eos=True,
            temperature=0, logprobs=0, return_token_ids=True, quality=args.quality,
        )["choices"][0]  # fmt: skip
        assert told["token_ids"] == response, "the answer is the one that was forced"
        return -sum(told["logprobs"]["token_logprobs"][1:]), len(response) - 1

    with open(args.data) as file, concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        lines = [line for line in file if line.strip()][: args.limit]
        sums = list(pool.map(scored, lines))
    tokens = sum(count for _, count in sums)
    print(f"{sum(loss for loss, _ in sums) / tokens:.5f} nats a token, over {tokens} tokens of {len(sums)} answers ({args.quality})")


if __name__ == "__main__":
    main()
