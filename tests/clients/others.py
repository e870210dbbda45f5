"""Clients that are too heavy for every run: litellm, LangChain, instructor and Pydantic AI, unchanged, against a cluster by its address.

    python3 -m venv v && v/bin/pip install litellm langchain-openai langchain-anthropic instructor 'pydantic-ai-slim[openai]'
    overfill serve & v/bin/python tests/clients/others.py http://127.0.0.1:8000

What they get need not be clever; it has to have the form that they asked for. Last run: see docs/api.md.
"""

import asyncio
import sys
from typing import Literal, Union

from pydantic import BaseModel, Field

address = sys.argv[1]
QUESTION = "What is the capital of France?"


class Cat(BaseModel):
    kind: Literal["cat"]
    name: str


class Dog(BaseModel):
    kind: Literal["dog"]
    age: int


class Pet(BaseModel):
    pet: Union[Cat, Dog] = Field(discriminator="kind")


def litellm_asks(model):
    import litellm

    ask = {"model": f"openai/{model}", "api_base": f"{address}/v1", "api_key": "unused", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24}
    whole = litellm.completion(**ask, temperature=0).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, temperature=0, stream=True)]
    assert "".join(pieces) == whole, (pieces, whole)
    messages = {**ask, "model": f"anthropic/{model}", "api_base": address}
    assert litellm.completion(**messages).choices[0].message.content


def langchain_asks(model):
    from langchain_anthropic import ChatAnthropic
    from langchain_openai import ChatOpenAI

    ask = {"base_url": f"{address}/v1", "api_key": "unused", "model": model, "max_tokens": 120, "temperature": 0}
    chat = ChatOpenAI(**ask)
    whole = chat.invoke(QUESTION).content
    assert "".join(piece.content for piece in chat.stream(QUESTION)) == whole
    assert chat.with_structured_output(Pet, method="json_schema").invoke("Make up a pet.").pet.kind in ("cat", "dog")
    responses = ChatOpenAI(**ask, use_responses_api=True)
    assert responses.invoke(QUESTION).text == whole
    assert ChatAnthropic(base_url=address, api_key="unused", model=model, max_tokens=24).invoke(QUESTION).content


def instructor_asks(model):
    import instructor
    import openai

    client = instructor.from_openai(openai.OpenAI(base_url=f"{address}/v1", api_key="unused"), mode=instructor.Mode.JSON_SCHEMA)
    pet = client.chat.completions.create(model=model, response_model=Pet, max_retries=0, max_tokens=160, messages=[{"role": "user", "content": "Make up a pet."}])
    assert pet.pet.kind in ("cat", "dog")


def pydantic_ai_asks(model):
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=f"{address}/v1", api_key="unused"))
    agent = Agent(chat, output_type=NativeOutput(Pet), model_settings={"max_tokens": 160}, retries=0)
    assert asyncio.run(agent.run("Make up a pet.")).output.pet.kind in ("cat", "dog")


if __name__ == "__main__":
    import openai

    model = openai.OpenAI(base_url=f"{address}/v1", api_key="unused").models.list().data[0].id
    failed = 0
    for asks in (litellm_asks, langchain_asks, instructor_asks, pydantic_ai_asks):
        try:
            asks(model)
            print(f"{asks.__name__}: as it should be")
        except Exception as error:  # each is told, and the others are tried
            failed += 1
            print(f"{asks.__name__}: {type(error).__name__}: {str(error)[:600]}")
    sys.exit(failed)
