"""The tokens that travel together in one step: a value, decided by the scheduler."""

from dataclasses import dataclass

from mlx_k2.engine.sequence import Sequence


@dataclass(frozen=True)
class MicrobatchRow:
    """``count`` tokens of a sequence from ``position`` on, all of the prompt or all generated."""

    sequence: Sequence
    position: int
    count: int
    is_prompt: bool
    draws_token: bool
    """Whether the token after the last of these is drawn: they are all that is known so far."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens themselves."""
        return tuple(self.sequence.token_ids[self.position : self.position + self.count])


@dataclass(frozen=True)
class Microbatch:
    """One step's rows, those of generated tokens first."""

    number: int
    rows: tuple[MicrobatchRow, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return sum(row.count for row in self.rows)
