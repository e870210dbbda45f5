"""Conversations as token ids: the JSON lines that `overfill train` reads, through the checkpoint's own chat template."""

import json
from dataclasses import dataclass


@dataclass
class Example:
    prompt: list
    response: list
    number: int


def conversation(line):
    """Messages, answer, and whether the answer is complete."""
    turns = line.get("messages")
    if turns is None:
        turns = [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["response"]}]
    *messages, answer = turns
    if answer["role"] != "assistant" or not answer["content"] or not messages:
        raise ValueError("a conversation ends with the assistant's answer, after a message of another role")
    return messages, answer["content"], line.get("complete", True)


def read(path, tokenizer, longest, most=None):
    """Examples of at most `longest` tokens with at least two to learn, and how many lines were left out."""
    end = tokenizer.eos_token_id
    examples, left_out, number = [], 0, 0
    with open(path, encoding="utf-8") as file:
        for at, line in enumerate(file, 1):
            if not line.strip():
                continue
            number += 1
            try:
                messages, answer, complete = conversation(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{path}: line {at}: {error}") from error
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            response = tokenizer(answer, add_special_tokens=False)["input_ids"] + ([end] if complete else [])
            if len(response) < 2 or len(prompt) + len(response) > longest:
                left_out += 1
                continue
            examples.append(Example(prompt, response, number))
            if len(examples) == most:
                break
    if not examples:
        raise SystemExit(f"{path}: none of its {left_out} conversations has at most {longest} tokens and an answer")
    return examples, left_out
