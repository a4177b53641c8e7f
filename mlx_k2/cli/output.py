"""Output of an answer while it is generated, or of several complete answers: plain text, or JSON lines on stdout."""

from collections.abc import Iterator, Sequence
from typing import Any

import click
import msgspec

from mlx_k2.chat.chat_events import CallEnded, Event
from mlx_k2.chat.completion import completion_of, sampled_logprob
from mlx_k2.cli.console import log, show_stage_use
from mlx_k2.cli.repl.screen import PlainScreen
from mlx_k2.cli.repl.wording import CUT_TEXTS
from mlx_k2.cli.streams import write_json_line
from mlx_k2.cli.terminal_text import printable
from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.batch_results import BatchResult, answer_all
from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.pipeline import StageUse
from mlx_k2.deployment.deploy import Deployment
from mlx_k2.deployment.restarting import Restart
from mlx_k2.scheduling.drafts import DraftSource
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.text.reply_parts import Content, Part, Reasoning, whole_reply
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.text.tool_call import ToolCall

_FINISH_TEXTS = {FinishReason.STOP: "complete", **CUT_TEXTS, FinishReason.CANCELLED: "cancelled"}


class TextOutput(PlainScreen):
    """Output as text: the answer to stdout; thinking, tool calls, counts and times to stderr."""

    def __init__(self, *, show_thinking: bool, verbose: bool = False) -> None:
        super().__init__(show_thinking=show_thinking)
        self._verbose = verbose

    def write_summary(self, summary: AnswerSummary, deployment: Deployment | None, use: tuple[StageUse, ...]) -> None:
        """End the line, then log one line of counts and times; with --verbose all of them, and each stage's use."""
        self.pause()
        if not self._verbose:
            log(_short_summary(summary))
            return
        counts = [f"{summary.generated_tokens} tokens ({_FINISH_TEXTS[summary.finish_reason]})"]
        cached_text = f" ({summary.cached_tokens} cached)" if summary.cached_tokens else ""
        counts += [f"prompt {summary.prompt_tokens} tokens{cached_text}", f"seed {summary.seed}"]
        times = []
        if deployment is not None:
            times.append(f"loaded in {deployment.load_s:.1f} s")
        if summary.time_to_first_token_s is not None:
            times.append(f"first token after {summary.time_to_first_token_s:.2f} s")
        if summary.prefill_tokens_per_s is not None:
            times.append(f"prefill {summary.prefill_tokens_per_s:.1f} tok/s")
        if summary.decode_tokens_per_s is not None:
            times.append(f"decode {summary.decode_tokens_per_s:.1f} tok/s")
        if summary.drafts:
            times.append(_accepted_drafts(summary))
        log(" · ".join(counts))
        log(" · ".join(times))
        if deployment is not None:
            show_stage_use(deployment, use)


def _accepted_drafts(summary: AnswerSummary) -> str:
    """Return the number of accepted draft tokens; also by source, if there are several sources."""
    counts_by_source = []
    for source in DraftSource:
        counts = [count for count in summary.drafts if count.source is source]
        if counts:
            num_accepted = sum(count.num_accepted for count in counts)
            num_drafted = sum(count.num_drafted for count in counts)
            counts_by_source.append(f"{source.value} {num_accepted} of {num_drafted}")
    by_source = f" ({', '.join(counts_by_source)})" if len(counts_by_source) > 1 else ""
    return f"{summary.accepted} of {summary.drafted} draft tokens accepted{by_source}"


def _short_summary(summary: AnswerSummary) -> str:
    parts = [f"{summary.generated_tokens} tokens"]
    if summary.finish_reason is not FinishReason.STOP:
        parts.append(_FINISH_TEXTS[summary.finish_reason])
    if summary.decode_tokens_per_s is not None:
        parts.append(f"{summary.decode_tokens_per_s:.1f} tok/s")
    if summary.time_to_first_token_s is not None:
        parts.append(f"first token after {summary.time_to_first_token_s:.2f} s")
    return " · ".join([*parts, f"seed {summary.seed}"])


class TokenLine(msgspec.Struct, frozen=True):
    """The line of a token without log-probabilities."""

    token: int
    text: str


class StageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's layers, memory, computing time, and fraction of the computing time of all stages."""

    host: str
    first_layer: int
    last_layer: int
    held_bytes: int
    peak_bytes: int
    busy_s: float
    busy_fraction: float


class JsonOutput(PlainScreen):
    """Output as one JSON object a line on stdout: each token, each call with its result, then ``{"summary": ...}``.

    docs/json.md describes the lines.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(show_thinking=False)
        self._tokenizer = tokenizer
        self._parts: list[Part] = []
        self._last_reply: list[Part] = []
        self._num_calls = 0
        """The number of tool calls before the last reply."""

    def show_event(self, event: Event) -> None:
        """Write a line for a token or a call. The parts of a reply are kept for the summary."""
        match event:
            case Token():
                self.pause()
                self._write_token(event)
            case Reasoning() | Content() | ToolCall():
                self._parts.append(event)
            case CallEnded(call, result):
                outcome = {"outcome": result.outcome.value, "result": result.text}
                write_json_line({"call": {"name": call.name, "arguments": call.arguments, **outcome}})
            case AnswerSummary():
                self._num_calls += sum(isinstance(part, ToolCall) for part in self._last_reply)
                self._last_reply, self._parts = self._parts, []
            case _:
                super().show_event(event)

    def show_restart(self, restart: Restart) -> None:
        """Write a line on a restart, and two lines to stderr."""
        write_json_line({"restart": restart})
        super().show_restart(restart)

    def _write_token(self, token: Token) -> None:
        """Write ``{"token": id, "text": ...}``, with log-probabilities if they were requested."""
        line: object = TokenLine(token.token_id, token.text)
        if token.logprob is not None:
            line = msgspec.structs.replace(sampled_logprob(self._tokenizer, token), text=token.text)
        write_json_line(line)

    def write_summary(self, summary: AnswerSummary, deployment: Deployment | None, use: tuple[StageUse, ...]) -> None:
        """Write the last reply with the counts and times of all replies, and a summary of each stage."""
        load_s = None if deployment is None else deployment.load_s
        stages = [] if deployment is None else _stage_summaries(deployment, use)
        completion = msgspec.to_builtins(completion_of(whole_reply(self._last_reply), summary, self._num_calls))
        write_json_line({"summary": {**completion, "load_s": load_s, "stages": stages}})


def _stage_summaries(deployment: Deployment, use: tuple[StageUse, ...]) -> list[StageSummary]:
    total_s = sum(stage.busy_s for stage in use) or 1.0
    return [
        StageSummary(
            host=plan.host.ssh,
            first_layer=plan.assignment.first_layer,
            last_layer=plan.assignment.end_layer - 1,
            held_bytes=loaded.held_bytes,
            peak_bytes=loaded.peak_bytes,
            busy_s=stage.busy_s,
            busy_fraction=stage.busy_s / total_s,
        )
        for plan, loaded, stage in zip(deployment.plans, deployment.loaded, use, strict=True)
    ]


def show_answers(engine: Engine, tokenizer: Tokenizer, submissions: Sequence[Submission], *, as_json: bool) -> None:
    """Run the requests of --num-answers and write each answer to stdout: its text, or one line of JSON.

    Raises:
        Exit: at least one answer failed; raised with code 1 after all answers.
        ClusterError: the stages failed and are not restarted.
    """
    num_failed = 0
    for result in _results_in_order(engine, submissions):
        num_failed += result.error is not None
        if as_json:
            write_json_line({"answer": {"index": result.key, **answer_fields(tokenizer, result)}})
            continue
        title, summary = f"answer {result.key + 1} of {len(submissions)}", result.summary
        if summary is None:
            log(f"{title} failed: {result.error}")
            continue
        click.echo(printable(result.reply.content))
        log(f"{title}: {summary.generated_tokens} tokens ({summary.finish_reason.value}), seed {summary.seed}")
    if num_failed:
        raise click.exceptions.Exit(1)


def answer_fields(tokenizer: Tokenizer, result: BatchResult, num_calls_before: int = 0) -> dict[str, Any]:
    """Return the fields of an answer in JSON. The ids of its calls are numbered from ``num_calls_before``."""
    if result.summary is None:
        return {"error": result.error}
    fields: dict[str, Any] = msgspec.to_builtins(completion_of(result.reply, result.summary, num_calls_before))
    if result.tokens:
        fields["logprobs"] = msgspec.to_builtins([sampled_logprob(tokenizer, token) for token in result.tokens])
    return fields


def _results_in_order(engine: Engine, submissions: Sequence[Submission]) -> Iterator[BatchResult]:
    """Yield the results in the order of ``submissions``, each as soon as it and all earlier ones are complete."""
    complete_results: dict[int, BatchResult] = {}
    next_key = 0
    for result in answer_all(engine, enumerate(submissions)):
        complete_results[result.key] = result
        while next_key in complete_results:
            yield complete_results.pop(next_key)
            next_key += 1
