"""A program that sends one chat request with the official client in four ways, and prints what it returns as JSON.

A stream is joined by the accumulator of the client.

It runs with OpenAI's client 1.x and with the current one, as `python client_script.py BASE_URL REQUEST`: REQUEST is
the JSON of the arguments of ``create``.
"""

import asyncio
import json
import sys
from typing import Any

import openai
from openai import APIError, AsyncOpenAI, OpenAI
from openai.lib.streaming.chat import ChatCompletionStreamState


def fields_of(completion: Any) -> dict[str, Any]:
    (choice,) = completion.choices
    message = choice.message
    return {
        "content": message.content or "",
        "reasoning": getattr(message, "reasoning_content", None) or "",
        "calls": [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()],
        "finish_reason": choice.finish_reason,
    }


def error_of(error: APIError) -> dict[str, Any]:
    return {"error": error.code}


def complete(client: OpenAI, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return fields_of(client.chat.completions.create(**request))
    except APIError as error:
        return error_of(error)


def stream(client: OpenAI, request: dict[str, Any]) -> dict[str, Any]:
    try:
        state = ChatCompletionStreamState()
        for chunk in client.chat.completions.create(stream=True, **request):
            state.handle_chunk(chunk)
        return fields_of(state.current_completion_snapshot)
    except APIError as error:
        return error_of(error)


async def complete_and_stream(base_url: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    async with AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=60) as client:
        try:
            found.append(fields_of(await client.chat.completions.create(**request)))
        except APIError as error:
            found.append(error_of(error))
        try:
            state = ChatCompletionStreamState()
            async for chunk in await client.chat.completions.create(stream=True, **request):
                state.handle_chunk(chunk)
            found.append(fields_of(state.current_completion_snapshot))
        except APIError as error:
            found.append(error_of(error))
    return found


def main() -> None:
    base_url, request = sys.argv[1], json.loads(sys.argv[2])
    client = OpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=60)
    results = [complete(client, request), stream(client, request)]
    results += asyncio.run(complete_and_stream(base_url, request))
    sys.stdout.write(json.dumps({"version": openai.__version__, "results": results}))


if __name__ == "__main__":
    main()
