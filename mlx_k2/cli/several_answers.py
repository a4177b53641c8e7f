"""Output of several answers to one prompt (--num-answers): each as a whole, in the order of their numbers."""

from collections.abc import Iterator, Sequence
from typing import Any

import click
import msgspec

from mlx_k2.chat.completion import completion_of, sampled_logprob
from mlx_k2.cli.console import log
from mlx_k2.cli.streams import write_json_line
from mlx_k2.cli.terminal_text import printable
from mlx_k2.coordinator.batch_results import BatchResult, answer_all
from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.text.tokenizer import Tokenizer


def show_answers(engine: Engine, tokenizer: Tokenizer, submissions: Sequence[Submission], *, as_json: bool) -> None:
    """Run the requests and write each answer to stdout: its text, or a JSON object a line.

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
