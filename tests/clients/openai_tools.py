"""Tool calls by OpenAI's own SDK, against a cluster whose template knows tools, by its address."""

import json
import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="unused", max_retries=0)
model = client.models.list().data[0].id
units = {"type": "string", "enum": ["C", "F"]}
parameters = {"type": "object", "properties": {"unit": units}, "required": ["unit"], "additionalProperties": False}
parameters["x-guidance"] = {"whitespace_flexible": False}
tools = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": parameters}}]
messages = [{"role": "user", "content": "How warm is it?"}]
ask = {"model": model, "messages": messages, "tools": tools, "max_tokens": 400, "temperature": 0, "parallel_tool_calls": False}

answer = client.chat.completions.create(**ask, tool_choice="required").choices[0]
assert answer.finish_reason == "tool_calls" and answer.message.content is None
call = answer.message.tool_calls[0]
assert call.function.name == "weather" and json.loads(call.function.arguments)["unit"] in ("C", "F")

streamed = ""
for chunk in client.chat.completions.create(**ask, tool_choice={"type": "function", "function": {"name": "weather"}}, stream=True):
    for piece in chunk.choices[0].delta.tool_calls or []:
        streamed += piece.function.arguments
assert json.loads(streamed)["unit"] in ("C", "F")

# The result goes back, and the chat goes on.
messages += [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "20 degrees"}]
assert client.chat.completions.create(**ask, tool_choice="none").choices[0].message.tool_calls is None
