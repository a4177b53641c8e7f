"""Writes an answer as it comes: plain text, or one JSON object a line. The only writer of stdout."""

import sys
from typing import Any, Protocol

import msgspec

from mlx_k2.cli.console import console, show_stage_use
from mlx_k2.coordinator import StageUse
from mlx_k2.deployment import Deployment
from mlx_k2.session import AnswerSummary, Delta
from mlx_k2.text.tokenizer import Tokenizer


class Output(Protocol):
    """Takes an answer's parts in order."""

    def token(self, delta: Delta) -> None:
        """One more token."""

    def summary(self, summary: AnswerSummary, deployment: Deployment, use: tuple[StageUse, ...]) -> None:
        """The answer is complete."""


class TextOutput:
    """The answer to stdout; a closing line and a table of the stages to stderr."""

    def token(self, delta: Delta) -> None:
        """Write the token's text at once."""
        sys.stdout.write(delta.text)
        sys.stdout.flush()

    def summary(self, summary: AnswerSummary, deployment: Deployment, use: tuple[StageUse, ...]) -> None:
        """End the line, then say on stderr what it took."""
        sys.stdout.write("\n")
        sys.stdout.flush()
        decode = summary.decode_tokens_per_s
        parts = (
            f"{summary.prompt_tokens} + {summary.generated_tokens} tokens ({summary.finish_reason.value})",
            f"loaded in {deployment.load_s:.1f} s",
            f"first token after {summary.time_to_first_token_s:.2f} s ({summary.prefill_tokens_per_s:.1f} tok/s)",
            f"then {decode:.1f} tok/s" if decode is not None else None,
            f"seed {summary.seed}",
        )
        console.print(" · ".join(part for part in parts if part), style="dim", markup=False, soft_wrap=True)
        show_stage_use(deployment, use)


class JsonOutput:
    """One JSON object a line on stdout: each token, then ``{"summary": ...}``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

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
            "stages": stages,
        }
        _write_line({"summary": fields})


def _write_line(value: dict[str, Any]) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()
