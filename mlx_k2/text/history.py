"""Messages for replies and tool results, and the numbering of a conversation's tool calls. Knows no template."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_k2.text.reply_parts import Reply
from mlx_k2.text.tool_call import UNKNOWN, call_id


def assistant_message(reply: Reply, num_calls_before: int) -> dict[str, Any]:
    """Return ``reply`` as a message in OpenAI's format; each call's arguments are the text that the model wrote.

    The calls get the ids that Kimi K2 is trained on, whatever the model wrote: functions.NAME:NUMBER, where NUMBER
    counts the calls of the whole conversation from 0. Missing text is '', never None.
    """
    calls = [
        {
            "id": call_id(call.name, number),
            "type": "function",
            "function": {"name": call.name or UNKNOWN, "arguments": call.arguments},
        }
        for number, call in enumerate(reply.calls, start=num_calls_before)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": reply.content, "reasoning_content": reply.reasoning}
    return message | {"tool_calls": calls} if calls else message


def tool_messages(assistant: Mapping[str, Any], results: Sequence[str]) -> list[dict[str, Any]]:
    """Return one message for each call of ``assistant``, in the order of its calls, with the text of its result."""
    return [
        {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": result}
        for call, result in zip(assistant.get("tool_calls", ()), results, strict=True)
    ]


def num_calls(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of tool calls in a conversation, which is also the number of its next call."""
    return sum(len(message.get("tool_calls") or ()) for message in messages)


def with_normal_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation from another source with the call ids that Kimi K2 is trained on, in calls and results.

    A result belongs to the latest turn that has a call with its id, and there to the first such call without a result.
    A result that answers no call is unchanged.
    """
    normal: list[dict[str, Any]] = []
    open_calls: dict[str, list[dict[str, Any]]] = {}
    number = 0
    for message in messages:
        copy = dict(message)
        if message.get("tool_calls"):
            copy["tool_calls"] = [
                {**call, "id": call_id(call["function"]["name"], number + index)}
                for index, call in enumerate(message["tool_calls"])
            ]
            number += len(copy["tool_calls"])
            open_calls |= _by_id(message["tool_calls"], copy["tool_calls"])
        waiting = open_calls.get(message["tool_call_id"]) if message.get("role") == "tool" else None
        if waiting:
            call = waiting.pop(0)
            copy |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
        normal.append(copy)
    return normal


def _by_id(old: Sequence[Mapping[str, Any]], new: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    by_id: dict[str, list[dict[str, Any]]] = {}
    for before, after in zip(old, new, strict=True):
        by_id.setdefault(before["id"], []).append(after)
    return by_id
