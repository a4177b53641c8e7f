"""Where replies come from: the stages, which also compute ahead while nobody asks. Knows tokens, and no messages."""

import threading
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Protocol

from mlx_k2.coordinator.pipeline import Coordinator
from mlx_k2.coordinator.text_stream import AnswerSummary, Delta, stream_answer
from mlx_k2.errors import ClusterError, SetupError
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import Request
from mlx_k2.text.tokenizer import Tokenizer

_CLOSE_S = 2.0


class ReplySource(Protocol):
    """Draws replies, one after the other."""

    def stream(
        self, request: Request, forced_tokens: Callable[[], Sequence[int]], stopped: Callable[[], bool]
    ) -> Generator[Delta | AnswerSummary, None, None]:
        """The reply to a prompt, as ``stream_answer`` gives it."""

    def prefill_next_prompt(self, prompt_ids: Callable[[], Sequence[int]]) -> None:
        """Until the next reply is asked for, compute the beginning of its prompt."""

    def cancel_prefill(self) -> None:
        """End what is computed ahead; what it has come to stays cached."""


class StageReplies:
    """Replies from stages that are ready. A context: at its end nothing is computed ahead any more."""

    def __init__(self, coordinator: Coordinator, tokenizer: Tokenizer) -> None:
        self._coordinator = coordinator
        self._tokenizer = tokenizer
        self._prefill: _Prefill | None = None

    def __enter__(self) -> "StageReplies":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._prefill is not None:
            self._prefill.stop()
            self._prefill.join(_CLOSE_S)  # a step that takes longer ends with the stages

    def stream(
        self, request: Request, forced_tokens: Callable[[], Sequence[int]], stopped: Callable[[], bool]
    ) -> Generator[Delta | AnswerSummary, None, None]:
        """The reply to a prompt.

        Raises:
            ClusterError: a stage failed, now or while something was computed ahead.
        """
        self.cancel_prefill()
        return stream_answer(self._coordinator, self._tokenizer, request, forced_tokens=forced_tokens, stopped=stopped)

    def prefill_next_prompt(self, prompt_ids: Callable[[], Sequence[int]]) -> None:
        """Until the next reply is asked for, compute ``prompt_ids`` on a thread of its own."""
        self.cancel_prefill()
        self._prefill = _Prefill(self._coordinator, prompt_ids)
        self._prefill.start()

    def cancel_prefill(self) -> None:
        """End what is computed ahead, after the steps that are under way.

        Raises:
            ClusterError: a stage had failed.
        """
        prefill, self._prefill = self._prefill, None
        if prefill is not None:
            prefill.stop()
            prefill.join()
            if prefill.fault is not None:
                raise prefill.fault


class _Prefill(threading.Thread):
    """Computes one prompt; the token that is drawn behind it is thrown away."""

    def __init__(self, coordinator: Coordinator, prompt_ids: Callable[[], Sequence[int]]) -> None:
        super().__init__(name="prefill", daemon=True)
        self._coordinator = coordinator
        self._prompt_ids = prompt_ids
        self._stopped = False
        self.fault: ClusterError | None = None

    def run(self) -> None:
        """Until the prompt is cached, or ``stop`` is called."""
        try:
            token_ids = tuple(self._prompt_ids())
        except SetupError:  # what cannot be rendered is refused when it is asked
            return
        request = Request(token_ids, 1, Sampling(seed=0, temperature=0), frozenset())
        try:
            for _ in self._coordinator.run(request, stopped=lambda: self._stopped):
                pass
        except ClusterError as fault:
            self.fault = fault

    def stop(self) -> None:
        """End it when a stage has finished its next step. Does not wait."""
        self._stopped = True
