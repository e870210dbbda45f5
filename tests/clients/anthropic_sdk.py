"""Anthropic's own SDK against a cluster, by its address: messages whole and streamed, a system, stop sequences, counting, tools, errors.
With `tools` as a second argument the cluster's template knows tools. Prints what the first answer says."""

import json
import sys

import anthropic

address, *kind = sys.argv[1:]
client = anthropic.Anthropic(base_url=address, api_key="unused", max_retries=0)
model = client.models.list().data[0].id if hasattr(client, "models") else "?"
question = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
ask = {"model": model, "max_tokens": 24, "messages": question, "extra_body": {"temperature": 0}}

answer = client.messages.create(**ask)
assert answer.role == "assistant" and answer.stop_reason in ("max_tokens", "end_turn"), answer
text = answer.content[0].text
counted = client.messages.count_tokens(model=model, messages=question).input_tokens
assert counted == answer.usage.input_tokens + answer.usage.cache_read_input_tokens, (counted, answer.usage)

with client.messages.stream(**ask) as stream:
    assert "".join(stream.text_stream) == text
    last = stream.get_final_message()
assert (last.content[0].text, last.stop_reason, last.usage.output_tokens) == (text, answer.stop_reason, answer.usage.output_tokens), last

longer = client.messages.count_tokens(model=model, messages=question, system="Be short.").input_tokens
assert longer != counted, longer

if len(text) > 8:
    stop = text[4:8]
    stopped = client.messages.create(**ask, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop), stopped
    assert stopped.content[0].text == text.split(stop)[0]

    # Where the assistant has begun, the answer goes on: the prompt and the beginning are those of the whole answer.
    begun = client.messages.create(**{**ask, "messages": [*question, {"role": "assistant", "content": text[:4].rstrip()}]})
    assert begun.content[0].text != text

try:
    client.messages.create(**{**ask, "model": "nobody"})
    raise AssertionError("an unknown model")
except anthropic.NotFoundError as error:
    assert "nobody" in error.message, error
try:
    client.messages.create(**{**ask, "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]})
    raise AssertionError("a picture")
except anthropic.BadRequestError as error:
    assert "image" in error.message, error

if kind == ["tools"]:
    schema = {"type": "object", "properties": {"unit": {"type": "string", "enum": ["C", "F"]}}, "required": ["unit"], "additionalProperties": False}
    tools = [{"name": "weather", "description": "The weather.", "input_schema": schema}]
    forced = {**ask, "max_tokens": 400, "tools": tools, "tool_choice": {"type": "tool", "name": "weather"}}
    called = client.messages.create(**forced)
    call = called.content[-1]
    assert called.stop_reason == "tool_use" and call.type == "tool_use" and call.input["unit"] in ("C", "F"), called
    with client.messages.stream(**forced) as stream:
        assert stream.get_final_message().content[-1].input == call.input
    result = [{"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "20 degrees"}]}]
    again = [*question, {"role": "assistant", "content": called.content}, {"role": "user", "content": result}]
    client.messages.create(**{**ask, "messages": again, "tools": tools, "tool_choice": {"type": "none"}})

print(json.dumps({"text": text}))
