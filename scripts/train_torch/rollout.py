"""Answers that the decode model writes itself, as it is at that moment, or that a running cluster writes."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import torch

from .data import Example
from .pair import Reading, padded

BLOCK = 4


def first_repeat(tokens):
    """Where a block of four tokens or more begins for the second time in a row: of all such blocks that which is whole first."""
    best = None
    for block in range(BLOCK, len(tokens) // 2 + 1):
        alike = 0
        for at, (before, token) in enumerate(zip(tokens, tokens[block:], strict=False)):
            alike = alike + 1 if before == token else 0
            if alike == block:
                best = min(best or (len(tokens) + 1, 0), (at + block + 1, at + 1))
                break
    return best[1] if best else None


def kept(example, answer):
    """The example with this answer, cut off where it begins to repeat itself; with its own where there is nothing to learn."""
    repeat = first_repeat(answer)
    if repeat is not None:
        answer = answer[: repeat + 1]
    return Example(example.prompt, answer, example.number) if len(answer) >= 2 else example


@torch.no_grad()
def written(full, model, examples, layers, rounding, options, end, keys, device):
    """The pair's answers: the full model reads the prompts and writes the first token, the decode model the rest. Every process
    writes as many steps as any other, since each takes part in gathering the weights."""
    prompts = [Example(example.prompt, [end, end], example.number) for example in examples]
    draw = [torch.Generator(device="cpu").manual_seed(key) for key in keys]

    def chosen(logits):
        if options.rollout_temperature == 0:
            return logits.argmax(-1).tolist()
        likely = (logits.float() / options.rollout_temperature).softmax(-1).cpu()
        return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in zip(likely, draw, strict=True)]

    answers = [[] for _ in examples]
    if options.mode == "overfill":
        reading = Reading(full, prompts, 1, True, device)
        cuts = [len(example.prompt) for example in examples]
        cache, mask = reading.context(layers, cuts, rounding)
        # Of the two rows of each answer the first is the prompt's last token.
        logits = full.lm_head(reading.states[::2])
    else:
        tokens, mask = padded([example.prompt for example in examples], device)
        said = model.model(input_ids=tokens, attention_mask=mask, use_cache=True)
        cuts = [len(example.prompt) for example in examples]
        last = torch.tensor(cuts, device=device) - 1
        cache = said.past_key_values
        logits = model.lm_head(said.last_hidden_state[torch.arange(len(cuts), device=device), last])
    position = torch.tensor(cuts, device=device)
    for step in range(options.rollout_tokens):
        for answer, token in zip(answers, chosen(logits), strict=True):
            if not answer or answer[-1] != end:
                answer.append(token)
        if step + 1 == options.rollout_tokens:
            break
        tokens = torch.tensor([[answer[-1]] for answer in answers], device=device)
        mask = torch.cat([mask, torch.ones_like(tokens)], -1)
        said = model.model(
            input_ids=tokens, attention_mask=mask, position_ids=position.unsqueeze(-1), cache=cache, use_cache=True
        )  # fmt: skip
        logits = model.lm_head(said.last_hidden_state[:, -1])
        position += 1
    return [kept(example, answer) for example, answer in zip(examples, answers, strict=True)]


def asked(url, key, model, examples, options, keys):
    """The same of a running cluster, through its HTTP door: its decode model is the one that it was started with."""

    def one(example_and_seed):
        example, seed = example_and_seed
        body = {
            "model": model, "prompt": example.prompt, "max_tokens": options.rollout_tokens, "temperature": options.rollout_temperature, "top_p": 1,
            "seed": seed, "return_token_ids": True, "quality": "overfill" if options.mode == "overfill" else "decode",
        }  # fmt: skip
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"{url.rstrip('/')}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return kept(example, json.load(answer)["choices"][0]["token_ids"])

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, zip(examples, keys, strict=True)))
