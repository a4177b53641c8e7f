"""A program that sends each request with OpenAI's client in four ways: complete and streamed, synchronous and not.

It runs with the client 1.x and with the current one, and prints the client's version first. A line of its input is a
JSON array of a base URL and the arguments of ``create``, for a response if they have an ``input``, else for a chat
completion. Its answer is a line with a JSON array: the fields received in each way, or one object with a traceback as
`failure`. The client joins the parts of a streamed completion; a streamed response is the one in the last event.
"""

import asyncio
import json
import sys
import traceback
from typing import Any

import openai
from openai import APIError, AsyncOpenAI, OpenAI
from openai.lib.streaming.chat import ChatCompletionStreamState

Fields = dict[str, Any]


def completion_fields(completion: Any) -> Fields:
    """Return the fields that a completion has in common with its stream."""
    (choice,) = completion.choices
    message = choice.message
    return {
        "content": message.content or "",
        "reasoning": getattr(message, "reasoning_content", None) or "",
        "calls": [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()],
        "finish_reason": choice.finish_reason,
    }


def response_fields(response: Any) -> Fields:
    """Return the fields that a response has in common with its stream."""
    return {"status": response.status, "output": [item_fields(item) for item in response.output]}


def item_fields(item: Any) -> tuple[str, str, str, str | None]:
    """Return type, status, text and call id of an output item. The call id of an item other than a call is None."""
    return item.type, item.status, item_text(item), getattr(item, "call_id", None)


def item_text(item: Any) -> str:
    """Return a call's arguments, or the joined parts of another item."""
    return str(item.arguments) if item.type == "function_call" else "".join(part.text for part in item.content)


def error_fields(error: APIError) -> Fields:
    return {"error": error.code}


class ResponseAccumulator:
    """The response that the events of a stream add up to. Asserts that items, deltas and snapshots agree."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.text = ""
        """The deltas of the item that is open."""
        self.fields: Fields = {}

    def add(self, event: Any) -> None:
        if event.type == "response.output_item.added":
            self.text = ""
        elif event.type.endswith(".delta"):
            self.text += event.delta
            assert getattr(event, "snapshot", self.text) == self.text  # the client adds snapshots to some types
        elif event.type == "response.output_item.done":
            assert item_text(event.item) == self.text
            self.items.append(event.item)
        elif event.type == "response.failed":
            self.fields = {"error": "unavailable"}  # the code of the error that `create` raises for this failure
        elif event.type in ("response.completed", "response.incomplete"):
            self.fields = response_fields(event.response)
            assert [item.id for item in event.response.output] == [item.id for item in self.items]
            assert self.fields["output"] == [item_fields(item) for item in self.items]


def receive(client: OpenAI, request: Fields) -> Fields:
    if "input" in request:
        return response_fields(client.responses.create(**request))
    return completion_fields(client.chat.completions.create(**request))


def receive_stream(client: OpenAI, request: Fields) -> Fields:
    if "input" in request:
        accumulator = ResponseAccumulator()
        with client.responses.stream(**request) as events:
            for event in events:
                accumulator.add(event)
        return accumulator.fields
    state = ChatCompletionStreamState()
    for chunk in client.chat.completions.create(stream=True, **request):
        state.handle_chunk(chunk)
    return completion_fields(state.current_completion_snapshot)


async def receive_async(client: AsyncOpenAI, request: Fields) -> Fields:
    if "input" in request:
        return response_fields(await client.responses.create(**request))
    return completion_fields(await client.chat.completions.create(**request))


async def receive_stream_async(client: AsyncOpenAI, request: Fields) -> Fields:
    if "input" in request:
        accumulator = ResponseAccumulator()
        async with client.responses.stream(**request) as events:
            async for event in events:
                accumulator.add(event)
        return accumulator.fields
    state = ChatCompletionStreamState()
    async for chunk in await client.chat.completions.create(stream=True, **request):
        state.handle_chunk(chunk)
    return completion_fields(state.current_completion_snapshot)


def synchronous_results(base_url: str, request: Fields) -> list[Fields]:
    results = []
    with OpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=60) as client:
        for receive_fields in (receive, receive_stream):
            try:
                results.append(receive_fields(client, request))
            except APIError as error:
                results.append(error_fields(error))
    return results


async def asynchronous_results(base_url: str, request: Fields) -> list[Fields]:
    results = []
    async with AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=60) as client:
        for receive_fields in (receive_async, receive_stream_async):
            try:
                results.append(await receive_fields(client, request))
            except APIError as error:
                results.append(error_fields(error))
    return results


def write_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    write_line(openai.__version__)
    for line in sys.stdin:
        base_url, request = json.loads(line)
        try:
            results = synchronous_results(base_url, request) + asyncio.run(asynchronous_results(base_url, request))
        except Exception:  # noqa: BLE001 - the test shows it
            results = [{"failure": traceback.format_exc()}]
        write_line(json.dumps(results))


if __name__ == "__main__":
    main()
