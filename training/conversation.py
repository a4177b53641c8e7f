"""Conversations and their text in K2's chat format. Knows nothing of token ids or of skills."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."  # the template's default

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True)
class Declaration:
    """A function that can be called. `properties` are the schemas of its parameters, all of them required."""

    name: str
    description: str
    properties: dict[str, Json]

    def schema(self) -> dict[str, Json]:
        """Return the function's tool schema in OpenAI's format."""
        parameters: Json = {"type": "object", "properties": self.properties, "required": list(self.properties)}
        function: Json = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Call:
    """One tool call: the function's name and its arguments in the order that the model writes."""

    name: str
    arguments: dict[str, Json]

    @property
    def arguments_text(self) -> str:
        """The arguments as the model writes them: JSON with ", " and ": "."""
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True)
class CallStep:
    """One step of a tool loop: the model's reasoning, its call, and the tool's result."""

    think: str
    call: Call
    result: str


@dataclass(frozen=True)
class Exchange:
    """One question, the tool calls made for it, and the answer."""

    question: str
    think: str
    answer: str
    steps: tuple[CallStep, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Exchanges with one system prompt (None: the format's default) and the declared tools."""

    system: str | None
    tools: tuple[Declaration, ...]
    exchanges: tuple[Exchange, ...]

    def messages(self, num_steps: int | None = None) -> list[dict[str, Json]]:
        """Return the messages of a prompt: all messages up to a reply in the last exchange.

        The prompt is for the reply after `num_steps` of this exchange's calls (None: after all of them).
        """
        messages: list[dict[str, Json]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        call_number = 0
        for exchange in self.exchanges:
            is_last = exchange is self.exchanges[-1]
            messages.append({"role": "user", "content": exchange.question})
            for step in exchange.steps[:num_steps] if is_last else exchange.steps:
                messages += _step_messages(step, call_number)
                call_number += 1
            if not is_last:
                messages.append({"role": "assistant", "reasoning_content": exchange.think, "content": exchange.answer})
        return messages


@dataclass(frozen=True)
class Segment:
    """A part of rendered text, split only at control tokens. `is_reply`: the model is trained to write it."""

    text: str
    is_reply: bool


def render(conversation: Conversation) -> Iterator[Segment]:
    """Yield the conversation as K2's template writes it.

    Earlier exchanges lose their reasoning, and the model is not trained on them.
    """
    if conversation.tools:
        yield Segment(_message("system", "tool_declare", declare(conversation.tools)), is_reply=False)
    system = DEFAULT_SYSTEM if conversation.system is None else conversation.system
    yield Segment(_message("system", "system", system), is_reply=False)
    call_number = 0
    for exchange in conversation.exchanges:
        is_last = exchange is conversation.exchanges[-1]
        yield Segment(_message("user", "user", exchange.question), is_reply=False)
        for step in exchange.steps:
            yield Segment(_turn_start("assistant", "assistant"), is_reply=False)
            yield Segment(_call_reply(step.think if is_last else "", step.call, call_number), is_reply=is_last)
            result = f"## Return of functions.{step.call.name}:{call_number}\n{step.result}"
            yield Segment(_message("system", step.call.name, result), is_reply=False)
            call_number += 1
        yield Segment(_turn_start("assistant", "assistant"), is_reply=False)
        think = exchange.think if is_last else ""
        yield Segment(f"<think>{think}</think>{exchange.answer}<|im_end|>", is_reply=is_last)


def render_prompt(conversation: Conversation, num_steps: int) -> str:
    """Return the prompt for the reply after `num_steps` calls of the last exchange. It opens the assistant's turn."""
    segments = list(render(conversation))
    replies = [index for index, segment in enumerate(segments) if segment.is_reply]
    return "".join(segment.text for segment in segments[: replies[num_steps]])


def declare(tools: tuple[Declaration, ...]) -> str:
    """Return the tools as K2 declares them: compact JSON with sorted keys."""
    return json.dumps([tool.schema() for tool in tools], ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _turn_start(kind: str, name: str) -> str:
    return f"<|im_{kind}|>{name}<|im_middle|>"


def _message(kind: str, name: str, content: str) -> str:
    return f"{_turn_start(kind, name)}{content}<|im_end|>"


def _call_reply(think: str, call: Call, number: int) -> str:
    return (
        f"<think>{think}</think><|tool_calls_section_begin|><|tool_call_begin|>functions.{call.name}:{number}"
        f"<|tool_call_argument_begin|>{call.arguments_text}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
    )


def _step_messages(step: CallStep, number: int) -> list[dict[str, Json]]:
    identity = f"functions.{step.call.name}:{number}"
    function: Json = {"name": step.call.name, "arguments": step.call.arguments_text}
    call: Json = {"id": identity, "type": "function", "function": function}
    return [
        {"role": "assistant", "reasoning_content": step.think, "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": identity, "name": step.call.name, "content": step.result},
    ]
