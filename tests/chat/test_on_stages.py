"""Tests of conversations over two real stages: cached tokens, computed tokens and prefill of the next prompt."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis
import psutil
import pytest

from mlx_k2.chat.chat_events import CallEnded
from mlx_k2.chat.chat_session import ChatSession, ReplySettings
from mlx_k2.chat.conversation import Conversation
from mlx_k2.cluster.hostfile import local_hostfile
from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.engine import Engine, engine_on
from mlx_k2.coordinator.handle import Token
from mlx_k2.coordinator.reply_policy import ReplyLimits
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest
from mlx_k2.deployment.deploy import deploy
from mlx_k2.deployment.listener import DeploymentListener, StageReport
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from mlx_k2.text.chat_template import ChatTemplate, load_chat_template
from mlx_k2.text.reply_parts import Content, Reasoning
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from mlx_k2.tools.outcome import Outcome, ToolResult
from mlx_k2.tools.servers import HttpServer, StdioServer
from mlx_k2.tools.toolbox import Limits, open_toolbox
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_source import ModelSource
from tests.chat.scripted import ScriptedStages, encode_reply
from tests.local_cluster import VOCAB_SIZE, write_model

MAX_GROWTH_BYTES = 60_000_000
"""Allowed growth of the resident memory of all processes over the last two thirds of the calls.

The tested runs need memory for the caches of some tens of thousands of tokens.
"""
SERVER = Path(__file__).parent.parent / "tools" / "mcp_server.py"


class PromptTokenCounter:
    """A counter of the prompt tokens that the first stage computes."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._changed = threading.Condition()

    def record(self, report: StageReport) -> None:
        if report.rank == 0:
            with self._changed:
                self._num_tokens += sum(
                    len(planned.row.token_ids) for planned in report.microbatch.rows if planned.row.is_prompt
                )
                self._changed.notify_all()

    def count_and_reset(self, *, at_least: int = 0) -> int:
        """Wait until ``at_least`` tokens were counted since the last call. Return the count and reset it to 0."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_tokens >= at_least, timeout=60)
            count, self._num_tokens = self._num_tokens, 0
        return count


@dataclass(frozen=True)
class Stages:
    """Two running stages, their engine, and the counter of the prompt tokens that they compute."""

    tokenizer: Tokenizer
    template: ChatTemplate
    engine: Engine
    context_tokens: int
    prompt_tokens: PromptTokenCounter

    def settings(self, max_tokens: int = 60, thinking_budget: int | None = None) -> ReplySettings:
        limits = ReplyLimits(thinking_budget=thinking_budget)
        return ReplySettings(
            Sampling(seed=3), max_tokens, stop_ids=frozenset(), context_tokens=self.context_tokens, limits=limits
        )


@contextlib.contextmanager
def two_stages(path_or_repo: str) -> Iterator[Stages]:
    source = ModelSource(path_or_repo=path_or_repo)
    request = DeploymentRequest(ClusterOptions(), local_hostfile(2), source, num_slots=2)
    model = describe_model(read_model_files(source).files, path_or_repo)
    prompt_tokens = PromptTokenCounter()
    with deploy(request, model, DeploymentListener()) as deployment:
        tokenizer = load_tokenizer(model.files, model.config.vocab_size)
        template = load_chat_template(model.files)
        with engine_on(deployment, draft_mode=DraftMode.NGRAM, on_report=prompt_tokens.record) as engine:
            yield Stages(tokenizer, template, engine, deployment.shape.context_tokens, prompt_tokens)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """Yield stages with random weights. Their answers have no stop token."""
    with two_stages(str(write_model(tmp_path_factory.mktemp("model") / "tiny"))) as stages:
        yield stages


def summary_in(events: Iterable[object]) -> AnswerSummary:
    """Return the only answer summary among the events."""
    (summary,) = [event for event in events if isinstance(event, AnswerSummary)]
    return summary


@pytest.mark.slow
def test_a_second_turn_computes_only_the_new_message_after_idle_prefill_of_the_answer(stages: Stages) -> None:
    conversation = Conversation(stages.template, stages.tokenizer)
    chat = ChatSession(stages.engine, stages.tokenizer, conversation, stages.settings())
    first = summary_in(chat.send_message("Tell me about the water and the world."))
    assert stages.prompt_tokens.count_and_reset() == first.prompt_tokens - first.cached_tokens
    num_known = len(conversation.next_prompt_prefix())
    num_answer = num_known - first.prompt_tokens

    chat.prefill_next_prompt()
    num_prefilled = stages.prompt_tokens.count_and_reset(at_least=num_answer - 1)
    assert num_prefilled <= num_answer + 1  # a token more or less may come from the cache

    message = "And the sun?"
    second = summary_in(chat.send_message(message))
    num_computed = second.prompt_tokens - second.cached_tokens
    assert second.cached_tokens >= num_known - 1
    assert stages.prompt_tokens.count_and_reset() == num_computed
    num_text_tokens = len(stages.tokenizer.encode_text(message + "assistant"))
    assert num_computed <= num_text_tokens + 4  # three control tokens, and one that may be computed again


def test_prefilling_the_next_prompt_does_not_change_the_answer(stages: Stages) -> None:
    def tokens(prefill: bool) -> list[int]:
        conversation = Conversation(stages.template, stages.tokenizer)
        chat = ChatSession(stages.engine, stages.tokenizer, conversation, stages.settings(max_tokens=20))
        list(chat.send_message("One."))
        if prefill:
            chat.prefill_next_prompt()
        return [event.token_id for event in chat.send_message("Two.") if isinstance(event, Token)]

    assert tokens(prefill=True) == tokens(prefill=False)


def test_a_stopped_answer_ends_within_two_tokens_and_a_retry_reuses_its_cached_prompt(stages: Stages) -> None:
    chat = ChatSession(
        stages.engine,
        stages.tokenizer,
        Conversation(stages.template, stages.tokenizer),
        stages.settings(max_tokens=900),
    )
    num_tokens = 0
    for event in chat.send_message("Go on for ever."):
        num_tokens += isinstance(event, Token)
        if num_tokens == 10:
            chat.stop()
        if isinstance(event, AnswerSummary):
            assert (event.finish_reason, event.generated_tokens) == (FinishReason.CANCELLED, num_tokens)
    assert num_tokens <= 12
    retry_events: list[object] = []
    for event in chat.retry():
        chat.stop()
        retry_events.append(event)
    retry = summary_in(retry_events)
    assert retry.cached_tokens == retry.prompt_tokens - 1  # the last token is always computed


def test_the_thinking_budget_ends_the_reasoning_and_the_answer_continues_from_the_cache(stages: Stages) -> None:
    thinking_template = ChatTemplate(
        stages.template.source.replace(
            "<|im_assistant|>assistant<|im_middle|>", "<|im_assistant|>assistant<|im_middle|><think>"
        )
    )
    conversation = Conversation(thinking_template, stages.tokenizer)
    chat = ChatSession(stages.engine, stages.tokenizer, conversation, stages.settings(thinking_budget=7, max_tokens=30))
    stages.prompt_tokens.count_and_reset()
    events = list(chat.send_message("Think."))
    ids = [event.token_id for event in events if isinstance(event, Token)]
    assert ids.index(stages.tokenizer.token_id("</think>")) == 7
    assert any(isinstance(event, Reasoning) for event in events)
    assert any(isinstance(event, Content) for event in events)
    summary = summary_in(events)
    assert summary.generated_tokens == 30 == len(ids)
    num_computed = stages.prompt_tokens.count_and_reset()
    assert num_computed <= summary.prompt_tokens - summary.cached_tokens + 2  # the reasoning is not computed again


@contextlib.contextmanager
def http_tool_server() -> Iterator[HttpServer]:
    """Start the tests' tool server with HTTP as its transport."""
    command = [sys.executable, str(SERVER), "http"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        yield HttpServer(name="f", url=f"http://127.0.0.1:{int(process.stdout.readline())}/mcp")
        process.kill()


NUM_CALLS = 300 if hypothesis.settings.get_current_profile_name() == "long" else 100
CONTEXT_TOKENS = 32768


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_many_tool_calls_in_a_row_reuse_the_cached_prefix_and_memory_stays_bounded(tmp_path: Path) -> None:
    stdio_server = StdioServer(name="n", command=sys.executable, args=(str(SERVER),))
    memory: list[int] = []
    results: list[ToolResult] = []
    with (
        two_stages(str(write_fast_model(tmp_path / "smallest"))) as stages,
        http_tool_server() as http_server,
        open_toolbox([stdio_server, http_server], Limits(start_timeout_s=40, call_timeout_s=40)) as tools,
    ):
        declarations = [item for item in tools.declarations if item["function"]["name"].endswith("_add")]
        conversation = Conversation(stages.template, stages.tokenizer, declarations)
        source = ScriptedStages(stages.engine, calls_and_an_answer(stages.tokenizer))
        settings = replace(stages.settings(max_tokens=200), stop_ids=stages.tokenizer.stop_ids)
        chat = ChatSession(source, stages.tokenizer, conversation, settings, tools, lambda call: True)
        summaries: list[AnswerSummary] = []
        for event in chat.send_message("Add."):
            if isinstance(event, AnswerSummary):
                summaries.append(event)
            if isinstance(event, CallEnded):
                results.append(event.result)
                memory.append(resident_bytes())
    assert [result.outcome for result in results] == [Outcome.DONE] * NUM_CALLS
    contents = [message.content for message in conversation.messages if message.role == "tool"]
    assert contents == [str(number % 10 + 2) for number in range(NUM_CALLS)]
    assert conversation.messages[-1].content == "Done."
    prompt_tokens = sum(summary.prompt_tokens for summary in summaries)
    cached_tokens = sum(summary.cached_tokens for summary in summaries)
    assert len(summaries) == NUM_CALLS // 2 + 1
    assert cached_tokens > 0.95 * prompt_tokens
    assert memory[-1] - memory[NUM_CALLS // 3] < MAX_GROWTH_BYTES


def write_fast_model(folder: Path) -> Path:
    """Write a very fast model, with one dense layer and one layer of experts. Return its folder."""
    fields = tiny_config_fields(
        VOCAB_SIZE,
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=1,
        num_key_value_heads=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        max_position_embeddings=CONTEXT_TOKENS,
    )
    vocabulary = tiny_vocabulary(VOCAB_SIZE, CONTEXT_TOKENS)
    write_random_checkpoint(folder, fields, seed=20, tokenizer_files=vocabulary.files)
    return folder


def calls_and_an_answer(tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield replies with two calls, one of each server's ``add``, ``NUM_CALLS`` calls in all, and then an answer."""
    for first_number in range(0, NUM_CALLS, 2):
        calls = "".join(
            f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>"
            f'{{"a": {number % 10}}}<|tool_call_end|>'
            for number, name in enumerate(("n_add", "f_add"), first_number)
        )
        section = f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>"
        yield encode_reply(tokenizer, f"<think></think>{section}<|im_end|>")
    yield encode_reply(tokenizer, "<think></think>Done.<|im_end|>")


def resident_bytes() -> int:
    """Return the resident memory of this process and its descendants."""
    this_process = psutil.Process()
    total = 0
    for process in (this_process, *this_process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total
