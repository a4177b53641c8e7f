"""Picks the next microbatch. Knows nothing of arrays, machines or time.

A microbatch holds one token of each sequence that is decoding and not in flight, and one chunk of the prompt that came
first. A prompt's chunks follow each other without waiting, so they overlap across stages.
"""

from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from mlx_k2.engine.microbatch import Microbatch, MicrobatchRow
from mlx_k2.engine.request import FinishReason, Request
from mlx_k2.engine.sequence import Sequence


@dataclass(frozen=True)
class SchedulerLimits:
    """What the scheduler must never exceed."""

    num_slots: int
    context_tokens: int
    chunk_tokens: int
    max_in_flight: int


class Scheduler:
    """Sequences waiting, running and in flight."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._waiting: deque[Request] = deque()
        self._free_slots = deque(range(limits.num_slots))
        self._running: list[Sequence] = []
        self._in_flight: deque[Microbatch] = deque()
        self._next_number = 0

    @property
    def has_work(self) -> bool:
        """Whether something is waiting, running or in flight."""
        return bool(self._waiting or self._running or self._in_flight)

    @property
    def oldest_in_flight(self) -> Microbatch | None:
        """What comes back next."""
        return self._in_flight[0] if self._in_flight else None

    def submit(self, request: Request) -> None:
        """Queue a request; it starts when a slot is free, in the order of submission."""
        self._waiting.append(request)

    def next_microbatch(self) -> Microbatch | None:
        """What to send to the stages now; None when nothing can go, or enough is in flight."""
        self._admit()
        if len(self._in_flight) >= self._limits.max_in_flight:
            return None
        rows = [row for sequence in self._running if (row := self._decode_row(sequence)) is not None]
        rows += self._prompt_rows()
        if not rows:
            return None
        microbatch = Microbatch(self._next_number, tuple(rows))
        self._next_number += 1
        for row in rows:
            row.sequence.num_planned = row.position + row.count
        self._in_flight.append(microbatch)
        return microbatch

    def complete(self, number: int, token_ids: Tokens[int]) -> tuple[Sequence | None, ...]:
        """Take the tokens that a step drew, one for each row that draws; returns the sequence that took each.

        None where the token is thrown away: its sequence was cancelled meanwhile.
        """
        microbatch = self._in_flight.popleft()
        drawing = [row.sequence for row in microbatch.rows if row.draws_token]
        assert microbatch.number == number, f"step {number} came back before step {microbatch.number}"
        assert len(drawing) == len(token_ids), f"step {number} drew {len(token_ids)} tokens, not {len(drawing)}"
        takers = tuple(sequence if sequence.finish_reason is None else None for sequence in drawing)
        for sequence, token_id in zip(takers, token_ids, strict=True):
            if sequence is not None:
                sequence.append(token_id)
        self._retire()
        return takers

    def cancel_all(self) -> None:
        """Stop every sequence; what is in flight comes back and is thrown away."""
        self._waiting.clear()
        for sequence in self._running:
            sequence.finish_reason = sequence.finish_reason or FinishReason.CANCELLED
        self._retire()

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            sequence = Sequence(self._waiting.popleft(), self._free_slots.popleft(), self._limits.context_tokens)
            self._running.append(sequence)

    def _retire(self) -> None:
        """Free the slots of finished sequences at once: plans that use them again come later."""
        for sequence in [sequence for sequence in self._running if sequence.finish_reason is not None]:
            self._running.remove(sequence)
            self._free_slots.append(sequence.slot)

    def _decode_row(self, sequence: Sequence) -> MicrobatchRow | None:
        if sequence.num_planned < sequence.num_prompt or sequence.num_unplanned == 0:
            return None
        count = min(sequence.num_unplanned, self._limits.chunk_tokens)
        return MicrobatchRow(sequence, sequence.num_planned, count, False, count == sequence.num_unplanned)

    def _prompt_rows(self) -> list[MicrobatchRow]:
        for sequence in self._running:
            left = sequence.num_prompt - sequence.num_planned
            if left > 0:
                count = min(left, self._limits.chunk_tokens)
                draws = sequence.num_planned + count == len(sequence.token_ids)
                return [MicrobatchRow(sequence, sequence.num_planned, count, True, draws)]
        return []
