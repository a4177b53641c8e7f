"""The interface between a chat session and the source of its replies. Knows tokens, but no messages."""

from typing import Protocol

from mlx_k2.coordinator.handle import Handle
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.token_policy import TokenPolicy


class ReplySource(Protocol):
    """A sampler of replies. ``mlx_k2.coordinator.engine.Engine`` samples on real stages."""

    def submit(self, request: Request, policy: TokenPolicy | None = None) -> Handle:
        """Queue a request and return its handle. Errors are those of ``Engine.submit``."""
