"""Request record: one running request as /v1/status, /metrics and cancellation see it. Knows no text."""

import time
from dataclasses import dataclass, field
from typing import Any

from mlx_k2.coordinator.handle import Event, PrefillProgress, Queued, Restarting, Token


@dataclass
class RequestRecord:
    """A running request: who made it, and how far it is. Times are of time.perf_counter."""

    id: str
    owner: str
    """The name of its API key; "" where none is required."""
    began: float = field(default_factory=time.perf_counter)
    phase: str = "queued"
    position: int | None = None
    """The number of requests that start before it, while it is queued."""
    prompt_done: int = 0
    prompt_total: int = 0
    num_tokens: int = 0
    started: float | None = None
    """The time of the first sign that the prompt is computed."""
    first_token: float | None = None
    last_token: float | None = None

    def add(self, event: Event) -> None:
        """Record an event."""
        match event:
            case Queued(position):
                self.phase, self.position = "queued", position
            case PrefillProgress(done, total):
                self.phase, self.prompt_done, self.prompt_total = "prefill", done, total
                self.started = self.started or time.perf_counter()
            case Restarting():
                self.phase = "restarting"
            case Token():
                self.phase = "decode"
                self.num_tokens += 1
                self.first_token = self.first_token or event.arrived_at
                self.last_token = event.arrived_at

    def fields(self, *, is_own: bool) -> dict[str, Any]:
        """Return the fields for /v1/status. Only its owner sees its id."""
        tokens_per_s = None
        if self.first_token is not None and self.last_token is not None and self.last_token > self.first_token:
            tokens_per_s = round((self.num_tokens - 1) / (self.last_token - self.first_token), 2)
        return {
            "id": self.id if is_own else None,
            "phase": self.phase,
            "position": self.position if self.phase == "queued" else None,
            "prompt_tokens_done": self.prompt_done,
            "prompt_tokens": self.prompt_total,
            "tokens": self.num_tokens,
            "tokens_per_s": tokens_per_s,
            "seconds": round(time.perf_counter() - self.began, 1),
        }
