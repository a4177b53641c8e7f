"""Test of a tool chat on real stages: with a template that keeps reasoning, each prompt extends the one before it."""

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
from tests.chat.scripted import ScriptedStages, encode_reply
from tests.chat.test_on_stages import SERVER, two_stages, write_fast_model

NUM_QUESTIONS = 3


def keep_reasoning(source: str) -> str:
    """Return ``source``, the built-in template's, changed to keep all reasoning and end in <think>, as K2.7-Code's."""
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
    """Yield two replies for each question, a call and an answer. ``opening`` precedes the reasoning of each reply."""
    for number in range(NUM_QUESTIONS):
        call = (
            f'<|tool_call_begin|>functions.n_add:{number}<|tool_call_argument_begin|>{{"a": {number}}}<|tool_call_end|>'
        )
        section = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|><|im_end|>"
        yield encode_reply(tokenizer, f"{opening}I need to add two numbers.</think>Wait.{section}")
        yield encode_reply(tokenizer, f"{opening}Now I know it.</think>It is {number + 2}.<|im_end|>")


@pytest.mark.slow
@pytest.mark.parametrize("keeps_reasoning", [True, False])
def test_at_most_two_tokens_of_a_reply_are_computed_again_if_the_template_keeps_reasoning(
    keeps_reasoning: bool, tmp_path: Path
) -> None:
    server = StdioServer(name="n", command=sys.executable, args=(str(SERVER),))
    with (
        two_stages(str(write_fast_model(tmp_path / "smallest"))) as stages,
        open_toolbox([server], Limits(start_timeout_s=40, call_timeout_s=40)) as tools,
    ):
        template = ChatTemplate(keep_reasoning(stages.template.source)) if keeps_reasoning else stages.template
        declarations = [item for item in tools.declarations if item["function"]["name"] == "n_add"]
        conversation = Conversation(template, stages.tokenizer, declarations)
        replies = calls_and_answers(stages.tokenizer, "" if keeps_reasoning else "<think>")
        source = ScriptedStages(stages.engine, replies)
        settings = replace(stages.settings(), stop_ids=stages.tokenizer.stop_ids)
        chat = ChatSession(source, stages.tokenizer, conversation, settings, tools, lambda call: True)
        num_computed = 0
        summaries: list[AnswerSummary] = []
        for number in range(NUM_QUESTIONS):
            events = chat.send_message(f"What is {number} + 2?")
            summaries += [event for event in events if isinstance(event, AnswerSummary)]
            num_computed += stages.prompt_tokens.count_and_reset()
    assert len(summaries) == 2 * NUM_QUESTIONS
    recomputed = [
        before.prompt_tokens + before.generated_tokens - after.cached_tokens
        for before, after in itertools.pairwise(summaries)
    ]
    if keeps_reasoning:
        assert max(recomputed) <= 2, recomputed  # the token that ended the reply, and the one before it
        conversation_tokens = summaries[-1].prompt_tokens + summaries[-1].generated_tokens
        assert num_computed <= conversation_tokens + 2 * len(recomputed)
    else:  # the template drops reasoning after an answer, which is every second reply
        assert max(recomputed[0::2]) <= 2 < min(recomputed[1::2]), recomputed
