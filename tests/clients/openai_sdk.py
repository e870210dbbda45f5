"""OpenAI's own SDK against a cluster, by its address; prints what it was told, as JSON, for the test to compare."""

import json
import sys

import openai

base = sys.argv[1]
client = openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0)
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
told = {}

greedy = {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 24}
whole = client.chat.completions.create(**greedy, logprobs=True, top_logprobs=2)
told["text"] = whole.choices[0].message.content
assert whole.usage.prompt_tokens_details.cached_tokens is not None
assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
first = whole.choices[0].logprobs.content[0]
assert first.top_logprobs[0].token == first.token and bytes(first.bytes).decode() == first.token

streamed, usage = "", None
for chunk in client.chat.completions.create(**greedy, stream=True, stream_options={"include_usage": True}):
    usage = chunk.usage or usage
    streamed += "".join(choice.delta.content or "" for choice in chunk.choices)
assert streamed == told["text"], (streamed, told)
assert usage.completion_tokens == whole.usage.completion_tokens

several = client.chat.completions.create(**greedy, n=4)
assert [c.message.content for c in several.choices] == [told["text"]] * 4
assert [c.index for c in several.choices] == [0, 1, 2, 3]
parts = [""] * 3
for chunk in client.chat.completions.create(**greedy | {"temperature": 0.9}, n=3, seed=7, stream=True):
    for choice in chunk.choices:
        parts[choice.index] += choice.delta.content or ""
again = client.chat.completions.create(**greedy | {"temperature": 0.9}, n=3, seed=7)
assert parts == [c.message.content for c in again.choices] and len(set(parts)) > 1, parts

free = client.chat.completions.create(**greedy, extra_body={"guided_regex": "(?s:.*)"})
assert free.choices[0].message.content == told["text"]

schema = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}
shape = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
formed = client.chat.completions.create(**greedy | {"max_tokens": 80}, response_format=shape)
city = json.loads(formed.choices[0].message.content)
assert set(city) == {"city", "large"} and isinstance(city["large"], bool), city
told["city"] = city

legacy = client.completions.create(model=model, prompt="One, two, three,", max_tokens=6, temperature=0, echo=True, logprobs=1)
logprobs = legacy.choices[0].logprobs
assert legacy.choices[0].text.startswith("One, two, three,") and "".join(logprobs.tokens) == legacy.choices[0].text
assert logprobs.token_logprobs[0] is None and all(p <= 0 for p in logprobs.token_logprobs[1:])

for wrong, error in [
    ({"model": "gpt-9"}, openai.NotFoundError),
    ({"temperature": -1}, openai.BadRequestError),
    ({"max_tokens": 10**9}, openai.BadRequestError),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "thing"}}}}, openai.BadRequestError),
]:
    try:
        client.chat.completions.create(**greedy | wrong)
        raise AssertionError(wrong)
    except error as e:
        assert e.body["message"] and e.body["type"] == "invalid_request_error", e.body

print(json.dumps(told))
