"""The interface between a chat session and the source of its replies. Knows tokens, but no messages."""

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.text_stream import Delta
from mlx_k2.scheduling.request import Request


class ReplySource(Protocol):
    """A sampler of replies, one at a time. ``mlx_k2.coordinator.text_stream.StageReplies`` samples on real stages."""

    def stream(
        self, request: Request, forced_tokens: Callable[[], Sequence[int]], stopped: Callable[[], bool]
    ) -> Generator[Delta | AnswerSummary, None, None]:
        """Yield a Delta for each token of the reply, then its AnswerSummary."""

    def prefill_next_prompt(self, prompt_ids: Callable[[], Sequence[int]]) -> None:
        """Compute the beginning of the next prompt until the next reply is requested."""

    def cancel_prefill(self) -> None:
        """End the prefill. Tokens that it has computed stay cached."""
