"""Output of an answer while it is generated, or of several as each is complete: plain text, or JSON lines on stdout."""

from collections.abc import Iterator, Sequence
from typing import Any

import click
import msgspec

from mlx_k2.chat.chat_events import CallEnded, Event
from mlx_k2.chat.completion import completion_of, sampled_logprob
from mlx_k2.cli.console import log, show_stage_use
from mlx_k2.cli.repl.screen import PlainScreen
from mlx_k2.cli.repl.wording import CUT
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

_ENDS = {FinishReason.STOP: "complete", **CUT, FinishReason.CANCELLED: "cancelled"}


class TextOutput(PlainScreen):
    """Output as text: the answer to stdout; thinking, calls and a closing line to stderr."""

    def __init__(self, *, show_thinking: bool, verbose: bool = False) -> None:
        super().__init__(show_thinking=show_thinking)
        self._verbose = verbose

    def summary(self, summary: AnswerSummary, deployment: Deployment | None, use: tuple[StageUse, ...]) -> None:
        """End the line, then write one line of counts and times to stderr; with --verbose all, and the stages' use."""
        self.pause()
        if not self._verbose:
            log(_short_summary(summary))
            return
        cached = summary.cached_tokens
        first_s, prefill, decode = (
            summary.time_to_first_token_s,
            summary.prefill_tokens_per_s,
            summary.decode_tokens_per_s,
        )
        parts = (
            f"{summary.generated_tokens} tokens ({_ENDS[summary.finish_reason]})",
            f"prompt {summary.prompt_tokens} tokens" + (f" ({cached} cached)" if cached else ""),
            f"seed {summary.seed}",
        )
        times = (
            None if deployment is None else f"loaded in {deployment.load_s:.1f} s",
            f"first token after {first_s:.2f} s" if first_s is not None else None,
            f"prefill {prefill:.1f} tok/s" if prefill is not None else None,
            f"decode {decode:.1f} tok/s" if decode is not None else None,
            _accepted_drafts(summary),
        )
        log(" · ".join(parts))
        log(" · ".join(part for part in times if part))
        if deployment is not None:
            show_stage_use(deployment, use)


def _accepted_drafts(summary: AnswerSummary) -> str | None:
    """Return the number of accepted draft tokens, with that of each source if there are several; None without any."""
    if not summary.drafts:
        return None
    counts = [
        f"{source.value} {sum(one.num_accepted for one in found)} of {sum(one.num_drafted for one in found)}"
        for source in DraftSource
        if (found := [one for one in summary.drafts if one.source is source])
    ]
    by_source = f" ({', '.join(counts)})" if len(counts) > 1 else ""
    return f"{summary.accepted} of {summary.drafted} draft tokens accepted{by_source}"


def _short_summary(summary: AnswerSummary) -> str:
    first_s, decode = summary.time_to_first_token_s, summary.decode_tokens_per_s
    parts = (
        f"{summary.generated_tokens} tokens",
        None if summary.finish_reason is FinishReason.STOP else _ENDS[summary.finish_reason],
        None if decode is None else f"{decode:.1f} tok/s",
        None if first_s is None else f"first token after {first_s:.2f} s",
        f"seed {summary.seed}",
    )
    return " · ".join(part for part in parts if part)


class TokenLine(msgspec.Struct, frozen=True):
    """The line of a token, if no log-probabilities were asked for."""

    token: int
    text: str


class StageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's layers, memory and computing time."""

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

    def event(self, event: Event) -> None:
        """Write a line for a token or a call. The parts of a reply are kept for the summary."""
        match event:
            case Token():
                self.pause()
                self._token(event)
            case Reasoning() | Content() | ToolCall():
                self._parts.append(event)
            case CallEnded(call, result):
                ended = {"outcome": result.outcome.value, "result": result.text}
                write_json_line({"call": {"name": call.name, "arguments": call.arguments, **ended}})
            case AnswerSummary():
                self._num_calls += sum(isinstance(part, ToolCall) for part in self._last_reply)
                self._last_reply, self._parts = self._parts, []
            case _:
                super().event(event)

    def restart(self, restart: Restart) -> None:
        """Write a line on a restart, and two lines to stderr."""
        write_json_line({"restart": restart})
        super().restart(restart)

    def _token(self, token: Token) -> None:
        """Write ``{"token": id, "text": ...}``, with log-probabilities if they were requested."""
        line: object = TokenLine(token.token_id, token.text)
        if token.logprob is not None:
            line = msgspec.structs.replace(sampled_logprob(self._tokenizer, token), text=token.text)
        write_json_line(line)

    def summary(self, summary: AnswerSummary, deployment: Deployment | None, use: tuple[StageUse, ...]) -> None:
        """Write the last reply with the counts and times of all, and each stage's layers, memory and computing time."""
        total_s = sum(stage.busy_s for stage in use) or 1.0
        on_stages = [] if deployment is None else [*zip(deployment.plans, deployment.loaded, use, strict=True)]
        stages = [
            StageSummary(
                host=plan.host.ssh,
                first_layer=plan.assignment.first_layer,
                last_layer=plan.assignment.end_layer - 1,
                held_bytes=loaded.held_bytes,
                peak_bytes=loaded.peak_bytes,
                busy_s=stage.busy_s,
                busy_fraction=stage.busy_s / total_s,
            )
            for plan, loaded, stage in on_stages
        ]
        load_s = None if deployment is None else deployment.load_s
        completion = msgspec.to_builtins(completion_of(whole_reply(self._last_reply), summary, self._num_calls))
        write_json_line({"summary": {**completion, "load_s": load_s, "stages": stages}})


def show_answers(engine: Engine, tokenizer: Tokenizer, submissions: Sequence[Submission], *, as_json: bool) -> None:
    """Run the requests of --num-answers and write each answer to stdout: its text, or a JSON object a line.

    Raises:
        Exit: with code 1 after all answers, if one failed.
        ClusterError: the stages failed and are not restarted.
    """
    num_failed = 0
    for result in _in_order(engine, submissions):
        num_failed += result.error is not None
        if as_json:
            write_json_line({"answer": {"index": result.key, **answer_fields(tokenizer, result)}})
            continue
        what = f"answer {result.key + 1} of {len(submissions)}"
        if result.summary is None:
            log(f"{what} failed: {result.error}")
            continue
        click.echo(printable(result.reply.content))
        summary = result.summary
        log(f"{what}: {summary.generated_tokens} tokens ({summary.finish_reason.value}), seed {summary.seed}")
    if num_failed:
        raise click.exceptions.Exit(1)


def answer_fields(tokenizer: Tokenizer, result: BatchResult, num_calls_before: int = 0) -> dict[str, Any]:
    """Return the fields of an answer in JSON."""
    if result.summary is None:
        return {"error": result.error}
    fields: dict[str, Any] = msgspec.to_builtins(completion_of(result.reply, result.summary, num_calls_before))
    if result.tokens:
        fields["logprobs"] = msgspec.to_builtins([sampled_logprob(tokenizer, token) for token in result.tokens])
    return fields


def _in_order(engine: Engine, submissions: Sequence[Submission]) -> Iterator[BatchResult]:
    done: dict[int, BatchResult] = {}
    num_shown = 0
    for result in answer_all(engine, enumerate(submissions)):
        done[result.key] = result
        while num_shown in done:
            yield done.pop(num_shown)
            num_shown += 1
