"""Responses by OpenAI's own SDK against a cluster, by its address: whole and streamed, parsed, tools, errors. With `tools` as a second
argument the cluster's template knows tools. Prints what the first answer says."""

import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

address, *kind = sys.argv[1:]
client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
model = client.models.list().data[0].id
ask = {"model": model, "input": "What is the capital of France?", "max_output_tokens": 24, "temperature": 0}

answer = client.responses.create(**ask)
text = answer.output_text
assert answer.status in ("completed", "incomplete") and answer.usage.output_tokens <= 24, answer
chat = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": ask["input"]}], max_tokens=24, temperature=0
)
assert chat.choices[0].message.content == text, "the same words as in a chat"

with client.responses.stream(**ask) as stream:
    events = list(stream)
# (Its `get_final_response` knows no end but `completed`.)
assert events[-1].response.output_text == text
numbers = [event.sequence_number for event in events]
assert numbers == list(range(len(numbers))), numbers
assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete"), events[-1]
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text

items = [
    {"role": "developer", "content": "Be short."},
    {"role": "user", "content": [{"type": "input_text", "text": ask["input"]}]},
    *answer.output,
    {"role": "user", "content": "And of Spain?"},
]
more = client.responses.create(**{**ask, "input": items}, include=["message.output_text.logprobs"], top_logprobs=2)
logprobs = more.output[0].content[0].logprobs
assert len(logprobs) in (more.usage.output_tokens, more.usage.output_tokens - 1), (len(logprobs), more.usage)
assert all(len(entry.top_logprobs) == 2 for entry in logprobs)


class Unit(BaseModel):
    unit: Literal["C", "F"]


parsed = client.responses.parse(**{**ask, "max_output_tokens": 400}, text_format=Unit).output_parsed
assert parsed.unit in ("C", "F"), parsed

for field, value in [("previous_response_id", "resp_1"), ("background", True)]:
    try:
        client.responses.create(**ask, **{field: value})
        raise AssertionError(field)
    except openai.BadRequestError as error:
        assert error.param == field, error

if kind == ["tools"]:
    schema = {"type": "object", "properties": {"unit": {"type": "string", "enum": ["C", "F"]}}, "required": ["unit"], "additionalProperties": False}
    tools = [{"type": "function", "name": "weather", "description": "The weather.", "parameters": schema, "strict": True}]
    forced = {**ask, "max_output_tokens": 400, "tools": tools, "tool_choice": {"type": "function", "name": "weather"}}
    called = client.responses.create(**forced)
    call = called.output[-1]
    assert call.type == "function_call" and json.loads(call.arguments)["unit"] in ("C", "F"), called
    with client.responses.stream(**forced) as stream:
        assert stream.get_final_response().output[-1].arguments == call.arguments
    again = [{"role": "user", "content": ask["input"]}, *called.output]
    again.append({"type": "function_call_output", "call_id": call.call_id, "output": "20 degrees"})
    client.responses.create(**{**ask, "input": again, "tools": tools, "tool_choice": "none"})

print(json.dumps({"text": text}))
