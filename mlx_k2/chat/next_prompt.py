"""Prefill, while the stages are idle, of the part of the next prompt that is known before the user's message."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from mlx_k2.coordinator.handle import Handle
from mlx_k2.errors import MlxK2Error
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import Priority, Request
from mlx_k2.scheduling.token_policy import TokenPolicy


class ReplySource(Protocol):
    """The receiver of requests: ``mlx_k2.coordinator.engine.Engine``, or a ``RemoteEngine``."""

    def submit(self, request: Request, policy: TokenPolicy | None = None) -> Handle:
        """Queue a request and return its handle. Raise the errors of ``Engine.submit``."""


class NextPromptPrefill:
    """A background request that prefills the known beginning of the next prompt, and discards the one sampled token.

    ``prefix_ids`` returns that beginning. It is called on a separate thread, because rendering may take a second.
    """

    def __init__(self, source: ReplySource, prefix_ids: Callable[[], Sequence[int]]) -> None:
        self._source = source
        self._prefix_ids = prefix_ids
        self._is_cancelled = False
        self._handle: Handle | None = None
        self._thread = threading.Thread(target=self._submit, name="next prompt", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Cancel the prefill, and wait until ``prefix_ids`` has returned, so that its conversation may be changed.

        Positions computed so far stay cached.
        """
        self._is_cancelled = True
        self._thread.join()
        if self._handle is not None:
            self._handle.cancel()

    def _submit(self) -> None:
        try:
            prefix_ids = tuple(self._prefix_ids())
            if prefix_ids and not self._is_cancelled:
                sampling = Sampling(seed=0, temperature=0)
                request = Request(prefix_ids, 1, sampling, frozenset(), priority=Priority.BACKGROUND)
                self._handle = self._source.submit(request)
        except MlxK2Error:  # the user's next request raises the same error
            return
