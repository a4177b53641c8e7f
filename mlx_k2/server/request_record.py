"""Request record: the owner and the progress of a running request, for /v1/status and /metrics. Knows no text."""

import time
from dataclasses import dataclass, field
from typing import Any

from mlx_k2.coordinator.handle import Event, PrefillProgress, Queued, Restarting, Token


@dataclass
class RequestRecord:
    """The owner and the progress of one request. Times are from time.perf_counter, in seconds."""

    id: str
    owner: str
    """The name of its API key; "" where none is required."""
    created_at: float = field(default_factory=time.perf_counter)
    phase: str = "queued"
    position: int | None = None
    """The number of requests ahead of it in the queue; None before it is known."""
    prompt_done: int = 0
    prompt_total: int = 0
    num_tokens: int = 0
    prefill_started_at: float | None = None
    """The time of the first progress of the prompt; None before it."""
    first_token_at: float | None = None
    last_token_at: float | None = None

    def add(self, event: Event) -> None:
        """Record an event."""
        match event:
            case Queued(position):
                self.phase, self.position = "queued", position
            case PrefillProgress(done, total):
                self.phase, self.prompt_done, self.prompt_total = "prefill", done, total
                self.prefill_started_at = self.prefill_started_at or time.perf_counter()
            case Restarting():
                self.phase = "restarting"
            case Token():
                self.phase = "decode"
                self.num_tokens += 1
                self.first_token_at = self.first_token_at or event.arrived_at
                self.last_token_at = event.arrived_at

    def fields(self, *, is_own: bool) -> dict[str, Any]:
        """Return the fields for /v1/status, for another owner (``is_own`` False) without the id."""
        tokens_per_s = None
        first, last = self.first_token_at, self.last_token_at
        if first is not None and last is not None and last > first:
            tokens_per_s = round((self.num_tokens - 1) / (last - first), 2)
        return {
            "id": self.id if is_own else None,
            "phase": self.phase,
            "position": self.position if self.phase == "queued" else None,
            "prompt_tokens_done": self.prompt_done,
            "prompt_tokens": self.prompt_total,
            "tokens": self.num_tokens,
            "tokens_per_s": tokens_per_s,
            "seconds": round(time.perf_counter() - self.created_at, 1),
        }
