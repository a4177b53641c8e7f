"""Messages for replies and tool results, and the numbering of a conversation's tool calls. Knows no template."""

from collections.abc import Sequence

from mlx_k2.text.message import CalledFunction, Message, MessageCall
from mlx_k2.text.reply_parts import Reply
from mlx_k2.text.tool_call import UNKNOWN, call_id


def assistant_message(reply: Reply, num_calls_before: int) -> Message:
    """Return ``reply`` as a message; each call's arguments are the text that the model wrote.

    The calls get the ids that Kimi K2 is trained on, not those that it wrote: functions.NAME:NUMBER, where NUMBER
    counts the calls of the whole conversation from 0. Missing text is '', never None.
    """
    calls = tuple(
        MessageCall(id=call_id(call.name, number), function=CalledFunction(call.name or UNKNOWN, call.arguments))
        for number, call in enumerate(reply.calls, start=num_calls_before)
    )
    return Message(role="assistant", content=reply.content, reasoning_content=reply.reasoning, tool_calls=calls)


def tool_messages(assistant: Message, results: Sequence[str]) -> list[Message]:
    """Return one message for each call of ``assistant``, in the order of its calls, with the text of its result."""
    return [
        Message(role="tool", tool_call_id=call.id, name=call.function.name, content=result)
        for call, result in zip(assistant.tool_calls, results, strict=True)
    ]


def num_calls(messages: Sequence[Message]) -> int:
    """Return the number of tool calls in a conversation, which is also the number of its next call."""
    return sum(len(message.tool_calls) for message in messages)
