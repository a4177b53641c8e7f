"""Writes an answer as it comes: plain text, or one JSON object a line. The only writer of stdout."""

import dataclasses
import sys
from types import TracebackType
from typing import Any

import msgspec

from mlx_k2.cli.console import console, note, note_restart, show_stage_use
from mlx_k2.coordinator import StageUse
from mlx_k2.deployment import Deployment
from mlx_k2.engine.request import FinishReason
from mlx_k2.recovery import Restart
from mlx_k2.session import AnswerSummary, Delta
from mlx_k2.text.tokenizer import Tokenizer

_ENDS = {
    FinishReason.STOP: "complete",
    FinishReason.LENGTH: "cut off at the limit of tokens",
    FinishReason.TIMEOUT: "cut off by --timeout",
    FinishReason.CANCELLED: "cancelled",
}


class TextOutput:
    """The answer to stdout; a closing line and a table of the stages to stderr. A context, which ends the last line."""

    def __init__(self) -> None:
        self._line_is_open = False

    def __enter__(self) -> "TextOutput":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_line()

    def token(self, delta: Delta) -> None:
        """Write the token's text at once."""
        if delta.text:
            self._line_is_open = True
            sys.stdout.write(delta.text)
            sys.stdout.flush()

    def restart(self, restart: Restart) -> None:
        """Say it on stderr; on a terminal below the words so far, which are no complete line."""
        if self._line_is_open and console.is_terminal:
            console.print()
        note_restart(restart)

    def summary(self, summary: AnswerSummary, deployment: Deployment, use: tuple[StageUse, ...]) -> None:
        """End the line, then say on stderr what it took."""
        self._end_line()
        first_s, prefill, decode = (
            summary.time_to_first_token_s,
            summary.prefill_tokens_per_s,
            summary.decode_tokens_per_s,
        )
        parts = (
            f"{summary.generated_tokens} tokens ({_ENDS[summary.finish_reason]})",
            f"prompt {summary.prompt_tokens} tokens",
            f"seed {summary.seed}",
        )
        times = (
            f"loaded in {deployment.load_s:.1f} s",
            f"first token after {first_s:.2f} s" if first_s is not None else None,
            f"prefill {prefill:.1f} tok/s" if prefill is not None else None,
            f"decode {decode:.1f} tok/s" if decode is not None else None,
            f"{summary.num_hits} of {summary.num_guesses} guesses right" if summary.num_guesses else None,
        )
        note(" · ".join(parts))
        note(" · ".join(part for part in times if part))
        show_stage_use(deployment, use)

    def _end_line(self) -> None:
        if self._line_is_open:
            self._line_is_open = False
            sys.stdout.write("\n")
            sys.stdout.flush()


class JsonOutput:
    """One JSON object a line on stdout: each token, then ``{"summary": ...}``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __enter__(self) -> "JsonOutput":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Every line is complete already."""

    def token(self, delta: Delta) -> None:
        """``{"token": id, "text": ...}``, with log-probabilities where they were asked for."""
        line: dict[str, Any] = {"token": delta.token_id, "text": delta.text}
        if delta.logprob is not None:
            line["logprob"] = delta.logprob
            line["top"] = [
                {
                    "token": token_id,
                    "text": self._tokenizer.token_bytes(token_id).decode(errors="replace"),
                    "logprob": p,
                }
                for token_id, p in delta.top
            ]
        _write_line(line)

    def restart(self, restart: Restart) -> None:
        """``{"restart": {...}}``, between the tokens."""
        note_restart(restart)
        _write_line({"restart": dataclasses.asdict(restart)})

    def summary(self, summary: AnswerSummary, deployment: Deployment, use: tuple[StageUse, ...]) -> None:
        """What it took, and each stage's part."""
        total_s = sum(stage.busy_s for stage in use) or 1.0
        stages = [
            {
                "host": plan.host.ssh,
                "first_layer": plan.share.first_layer,
                "last_layer": plan.share.end_layer - 1,
                "held_bytes": loaded.held_bytes,
                "peak_bytes": loaded.peak_bytes,
                "busy_s": stage.busy_s,
                "share": stage.busy_s / total_s,
            }
            for plan, loaded, stage in zip(deployment.plans, deployment.loaded, use, strict=True)
        ]
        fields = {
            "prompt_tokens": summary.prompt_tokens,
            "generated_tokens": summary.generated_tokens,
            "finish_reason": summary.finish_reason.value,
            "seed": summary.seed,
            "load_s": deployment.load_s,
            "time_to_first_token_s": summary.time_to_first_token_s,
            "prefill_tokens_per_s": summary.prefill_tokens_per_s,
            "decode_tokens_per_s": summary.decode_tokens_per_s,
            "guesses": summary.num_guesses,
            "hits": summary.num_hits,
            "stages": stages,
        }
        _write_line({"summary": fields})


def _write_line(value: dict[str, Any]) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()
