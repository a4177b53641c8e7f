"""Tests of tool chats on real stages: with a template that keeps reasoning, a prompt only adds to the one before it."""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_k2.chat.chat_session import ChatSession
from mlx_k2.chat.conversation import Conversation
from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.text.chat_template import ChatTemplate
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.tools.servers import StdioServer
from mlx_k2.tools.toolbox import Limits, open_toolbox
from tests.chat.scripted import ScriptOnStages, sampled
from tests.chat.test_on_stages import SERVER, two_stages, write_smallest

NUM_QUESTIONS = 3


def keeping(source: str) -> str:
    """Return the built-in template with all reasoning kept, and with <think> opened by the prompt, as K2.7-Code's."""
    changes = {
        " if loop.index0 > last.answer": "",
        "{%- if add_generation_prompt -%}\n    <|im_assistant|>assistant<|im_middle|>": (
            "{%- if add_generation_prompt -%}\n    <|im_assistant|>assistant<|im_middle|><think>"
        ),
    }
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    return source


def calls_and_answers(tokenizer: Tokenizer, opening: str) -> Iterator[list[int]]:
    """Yield a call and an answer for each question; ``opening`` precedes the reasoning of each reply."""
    for number in range(NUM_QUESTIONS):
        call = (
            f'<|tool_call_begin|>functions.n_add:{number}<|tool_call_argument_begin|>{{"a": {number}}}<|tool_call_end|>'
        )
        section = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|><|im_end|>"
        yield sampled(tokenizer, f"{opening}I need to add two numbers.</think>Wait.{section}")
        yield sampled(tokenizer, f"{opening}Now I know it.</think>It is {number + 2}.<|im_end|>")


@pytest.mark.slow
@pytest.mark.parametrize("keeps_reasoning", [True, False])
def test_a_tool_chat_computes_no_token_twice_if_the_template_keeps_reasoning(
    keeps_reasoning: bool, tmp_path: Path
) -> None:
    server = StdioServer(name="n", command=sys.executable, args=(str(SERVER),))
    with (
        two_stages(str(write_smallest(tmp_path / "smallest"))) as stages,
        open_toolbox([server], Limits(start_timeout_s=40, call_timeout_s=40)) as tools,
    ):
        template = ChatTemplate(keeping(stages.template.source)) if keeps_reasoning else stages.template
        declared = [item for item in tools.declarations if item["function"]["name"] == "n_add"]
        conversation = Conversation(template, stages.tokenizer, declared)
        replies = calls_and_answers(stages.tokenizer, "" if keeps_reasoning else "<think>")
        source = ScriptOnStages(stages.engine, replies)
        settings = replace(stages.settings(), stop_ids=stages.tokenizer.stop_ids)
        chat = ChatSession(source, stages.tokenizer, conversation, settings, tools, lambda call: True)
        computed = []
        summaries: list[AnswerSummary] = []
        for number in range(NUM_QUESTIONS):
            events = chat.send_message(f"What is {number} + 2?")
            summaries += [event for event in events if isinstance(event, AnswerSummary)]
            computed.append(stages.computed.next_tokens())
    assert len(summaries) == 2 * NUM_QUESTIONS
    lost = [
        before.prompt_tokens + before.generated_tokens - after.cached_tokens
        for before, after in itertools.pairwise(summaries)
    ]
    if keeps_reasoning:
        assert max(lost) <= 2, lost  # the token that ended the reply, and the one before it
        whole = summaries[-1].prompt_tokens + summaries[-1].generated_tokens
        assert sum(computed) <= whole + 2 * len(lost)
    else:
        assert max(lost[0::2]) <= 2 < min(lost[1::2]), lost
