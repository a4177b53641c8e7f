"""The tokens that travel together in one step: a value, decided by the scheduler."""

from dataclasses import dataclass
from functools import cached_property

from mlx_k2.scheduling.cost_model import StepLoad, row_load
from mlx_k2.scheduling.sequence import Sequence


@dataclass(frozen=True)
class MicrobatchRow:
    """Tokens of a sequence from ``position`` on, all of the prompt or all generated (or guessed)."""

    sequence: Sequence
    position: int
    token_ids: tuple[int, ...]
    is_prompt: bool
    needs_logits: bool
    """Whether the token after the last of these is drawn: they are all that is known, or guessed, so far."""
    copy_from: int | None = None
    """The slot from which all positions before these are copied first."""

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.position + len(self.token_ids)

    @property
    def recent_ids(self) -> tuple[int, ...]:
        """The last tokens before the one to be drawn, which a repetition penalty looks at."""
        return self.sequence.recent_ids(self.end)

    @property
    def load(self) -> StepLoad:
        """What it asks of every stage."""
        return row_load(self.position, len(self.token_ids), is_prompt=self.is_prompt, needs_logits=self.needs_logits)


@dataclass(frozen=True)
class Microbatch:
    """One step's rows, those of generated tokens first."""

    number: int
    rows: tuple[MicrobatchRow, ...]

    @property
    def decodes(self) -> bool:
        """Whether sequences that decode wait for it."""
        return not self.rows[0].is_prompt

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return self.load.num_tokens

    @cached_property
    def load(self) -> StepLoad:
        """What it asks of every stage."""
        return sum((row.load for row in self.rows), StepLoad())
