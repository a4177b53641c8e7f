"""A program that sends each request with the official client in four ways, and prints what it returns as JSON.

A stream is joined by the accumulator of the client.

It runs with OpenAI's client 1.x and with the current one. A line of its input is a base URL and the arguments of
``create``, for a response if they have an ``input``, else for a chat completion. It answers with a line.
"""

import asyncio
import json
import sys
import traceback
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


def fields_of_response(response: Any) -> dict[str, Any]:
    return {
        "status": response.status,
        "output": [(item.type, item.status, text_of(item), getattr(item, "call_id", None)) for item in response.output],
    }


def text_of(item: Any) -> str:
    return str(item.arguments) if item.type == "function_call" else "".join(part.text for part in item.content)


class ResponseAccumulator:
    """The response that the events of a stream build: its complete items, which the snapshots and deltas must equal."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.text = ""
        self.response: dict[str, Any] = {}

    def add(self, event: Any) -> None:
        if event.type == "response.output_item.added":
            self.text = ""
        elif event.type.endswith(".delta"):
            self.text += event.delta
            assert getattr(event, "snapshot", self.text) == self.text
        elif event.type == "response.output_item.done":
            assert text_of(event.item) == self.text
            self.items.append(event.item)
        elif event.type == "response.failed":
            self.response = {"error": "unavailable"}
        elif event.type in ("response.completed", "response.incomplete"):
            self.response = fields_of_response(event.response)
            assert [item.id for item in event.response.output] == [item.id for item in self.items]
            assert fields_of_response(event.response)["output"] == [
                (item.type, item.status, text_of(item), getattr(item, "call_id", None)) for item in self.items
            ]


def error_of(error: APIError) -> dict[str, Any]:
    return {"error": error.code}


def complete(client: OpenAI, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "input" in request:
            return fields_of_response(client.responses.create(**request))
        return fields_of(client.chat.completions.create(**request))
    except APIError as error:
        return error_of(error)


def stream(client: OpenAI, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "input" in request:
            accumulator = ResponseAccumulator()
            with client.responses.stream(**request) as events:
                for event in events:
                    accumulator.add(event)
            return accumulator.response
        state = ChatCompletionStreamState()
        for chunk in client.chat.completions.create(stream=True, **request):
            state.handle_chunk(chunk)
        return fields_of(state.current_completion_snapshot)
    except APIError as error:
        return error_of(error)


async def complete_async(client: AsyncOpenAI, request: dict[str, Any]) -> dict[str, Any]:
    if "input" in request:
        return fields_of_response(await client.responses.create(**request))
    return fields_of(await client.chat.completions.create(**request))


async def stream_async(client: AsyncOpenAI, request: dict[str, Any]) -> dict[str, Any]:
    if "input" in request:
        accumulator = ResponseAccumulator()
        async with client.responses.stream(**request) as events:
            async for event in events:
                accumulator.add(event)
        return accumulator.response
    state = ChatCompletionStreamState()
    async for chunk in await client.chat.completions.create(stream=True, **request):
        state.handle_chunk(chunk)
    return fields_of(state.current_completion_snapshot)


async def complete_and_stream(base_url: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    results = []
    async with AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=60) as client:
        for send in (complete_async, stream_async):
            try:
                results.append(await send(client, request))
            except APIError as error:
                results.append(error_of(error))
    return results


def results(base_url: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    with OpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=60) as client:
        sync_results = [complete(client, request), stream(client, request)]
    return sync_results + asyncio.run(complete_and_stream(base_url, request))


def main() -> None:
    for line in sys.stdin:
        try:
            answer = {"version": openai.__version__, "results": results(*json.loads(line))}
        except Exception:  # noqa: BLE001 - the test shows it
            answer = {"failure": traceback.format_exc()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
