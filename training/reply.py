"""Parsed replies and expected replies. Knows nothing of how replies are generated."""

import json
import re
from dataclasses import dataclass

from training.conversation import Json
from training.data import Question

_CALL = re.compile(
    r"<\|tool_call_begin\|>functions\.(?P<name>[^:]+):\d+"
    r"<\|tool_call_argument_begin\|>(?P<arguments>.*?)<\|tool_call_end\|>",
    re.DOTALL,
)


@dataclass(frozen=True)
class Reply:
    """The scored parts of a reply: the answer, and the names and arguments of the calls."""

    answer: str
    calls: tuple[tuple[str, Json], ...] = ()


def parse(text: str) -> Reply:
    """Parse a raw reply, from `<think>` to before `<|im_end|>`. Arguments that are not JSON stay text."""
    rest = text.partition("</think>")[2]
    answer = rest.partition("<|tool_calls_section_begin|>")[0]
    return Reply(answer, tuple((call["name"], _loads(call["arguments"])) for call in _CALL.finditer(rest)))


def expected(question: Question) -> Reply:
    """Return the right reply to a question."""
    exchange = question.conversation.exchanges[-1]
    if question.num_steps == len(exchange.steps):
        return Reply(exchange.answer)
    call = exchange.steps[question.num_steps].call
    return Reply("", ((call.name, dict(call.arguments)),))


def _loads(text: str) -> Json:
    try:
        value: Json = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value
