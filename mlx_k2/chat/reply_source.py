"""The source of a conversation's replies, as a chat session uses it. Knows tokens, and no messages."""

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.text_stream import Delta
from mlx_k2.scheduling.request import Request


class ReplySource(Protocol):
    """Samples replies, one after the other; ``mlx_k2.coordinator.text_stream.StageReplies`` over real stages."""

    def stream(
        self, request: Request, forced_tokens: Callable[[], Sequence[int]], stopped: Callable[[], bool]
    ) -> Generator[Delta | AnswerSummary, None, None]:
        """Yield a Delta for each token of the reply, then its AnswerSummary."""

    def prefill_next_prompt(self, prompt_ids: Callable[[], Sequence[int]]) -> None:
        """Compute the beginning of the next prompt until the next reply is requested."""

    def cancel_prefill(self) -> None:
        """End the prefill; what it computed stays cached."""
