"""The usage totals of a chat. Knows no terminal."""

from dataclasses import dataclass

from mlx_k2.chat.chat_events import CallEnded, Event
from mlx_k2.coordinator.answer_summary import AnswerSummary


@dataclass
class UsageTotals:
    """Counts over all replies. ``context_used`` is the length of the conversation in tokens, of ``context_tokens``.

    ``num_stages`` None: the stages are a server's, and their number is not known.
    """

    context_tokens: int
    num_stages: int | None
    context_used: int = 0
    num_replies: int = 0
    num_calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    last_summary: AnswerSummary | None = None

    def add(self, event: Event) -> None:
        """Add an event to the counts."""
        match event:
            case AnswerSummary():
                self.last_summary = event
                self.num_replies += 1
                self.prompt_tokens += event.prompt_tokens
                self.cached_tokens += event.cached_tokens
                self.generated_tokens += event.generated_tokens
                self.context_used = event.prompt_tokens + event.generated_tokens
            case CallEnded():
                self.num_calls += 1

    def status_line(self) -> str:
        """Return one line: use of the context, speed and cached tokens of the last reply, and number of stages."""
        parts = [f"context {self.context_used} of {self.context_tokens}"]
        if self.last_summary is not None:
            if self.last_summary.decode_tokens_per_s is not None:
                parts.append(f"{self.last_summary.decode_tokens_per_s:.1f} tok/s")
            parts.append(f"{self.last_summary.cached_tokens} of {self.last_summary.prompt_tokens} prompt tokens cached")
        if self.num_stages is not None:
            parts.append(f"{self.num_stages} stages" if self.num_stages > 1 else "1 stage")
        return " · ".join(parts)

    def totals_line(self) -> str:
        """Return one line of totals for the whole chat."""
        fraction = 100 * self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        return (
            f"replies {self.num_replies} · tool calls {self.num_calls} · tokens {self.generated_tokens} · "
            f"prompt tokens {self.prompt_tokens}, {fraction:.1f}% cached"
        )
