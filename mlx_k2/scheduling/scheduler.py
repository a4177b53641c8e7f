"""Scheduler: picks the next microbatch. Knows no arrays and no machines; all timing comes from the step policy.

Decoding sequences alternate in the number of microbatches that is predicted to be fastest. Prompts run in order of
arrival, in chunks that do not wait for each other, so that they overlap across stages. While other sequences decode,
chunks are short enough to limit their delay. With drafts enabled, a lone sequence's idle stages run draft tokens.
"""

from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from itertools import islice

from mlx_k2.scheduling.cost_model import StepLoad
from mlx_k2.scheduling.microbatch import Microbatch, PlannedRow
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.sequence import Sequence
from mlx_k2.scheduling.slots import SlotPool, common_prefix
from mlx_k2.scheduling.step_policy import CHUNK_DELAY_STEPS, DecodeRound, StepPolicy

_WORTH_WAITING = 32
"""A prompt is postponed if this microbatch will cache at least this many more of its tokens than are cached now."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits of the scheduler. ``chunk_tokens`` is the maximum number of prompt tokens in one microbatch."""

    num_slots: int
    context_tokens: int
    chunk_tokens: int
    num_stages: int
    prompts_first: bool = False
    """Run all prefill before decode (offline throughput mode): more tokens per second in total."""

    @property
    def max_in_flight(self) -> int:
        """Maximum number of microbatches in flight."""
        return 2 * self.num_stages


class Scheduler:
    """Waiting requests, running sequences and microbatches in flight."""

    def __init__(self, limits: SchedulerLimits, policy: StepPolicy, *, drafts: bool = False) -> None:
        self._limits = limits
        self._policy = policy
        self._drafts = drafts
        self._waiting: deque[Request] = deque()
        self._slots = SlotPool(limits.num_slots)
        self._running: list[Sequence] = []
        self._in_flight: deque[Microbatch] = deque()
        self._next_number = 0

    @property
    def has_work(self) -> bool:
        """True if anything is waiting, running or in flight."""
        return bool(self._waiting or self._running or self._in_flight)

    def submit(self, request: Request) -> None:
        """Queue a request. Requests start in the order of submission, when a slot is free."""
        self._waiting.append(request)

    def next_microbatch(self) -> Microbatch | None:
        """Return the next microbatch to send; None if no row can run or enough microbatches are in flight."""
        decoding = [sequence for sequence in self._running if sequence.num_prompt_left == 0]
        prompts_left = len(decoding) < len(self._running) or bool(self._waiting and self._slots.num_free)
        waits = prompts_left and self._limits.prompts_first
        decode_round = self._decode_round(decoding) if decoding and not waits else None
        if len(self._in_flight) >= self._most_in_flight(decode_round, prompts_left):
            return None
        rows = [] if decode_round is None else self._decode_rows(decoding, decode_round)
        if prompts_left:
            self._add_prompt_rows(rows, decode_round)
        if not rows and len(decoding) == 1 and not prompts_left:
            rows = self._draft_rows(decoding[0])
        return self._send(rows) if rows else None

    def complete(self, number: int, token_ids: Tokens[int]) -> tuple[Sequence | None, ...]:
        """Append the tokens that a step sampled, one per row with ``needs_logits``; return the sequence of each token.

        The entry is None if the token is discarded: its sequence has ended, or a draft token before it was wrong.
        """
        microbatch = self._in_flight.popleft()
        sampled_sequences = [planned.sequence for planned in microbatch.rows if planned.row.needs_logits]
        assert microbatch.number == number, f"step {number} came back before step {microbatch.number}"
        assert len(sampled_sequences) == len(token_ids), (
            f"step {number} drew {len(token_ids)} tokens, not {len(sampled_sequences)}"
        )
        recipients = tuple(
            sequence if sequence.append_sampled(number, token_id, self._next_number) else None
            for sequence, token_id in zip(sampled_sequences, token_ids, strict=True)
        )
        self._retire()
        return recipients

    def reset(self) -> None:
        """Plan every running sequence again from its first token. Call it when new stages with empty caches start."""
        self._in_flight.clear()
        self._slots.forget()
        for sequence in self._running:
            sequence.reset(self._next_number)

    def stop(self, sequence: Sequence, reason: FinishReason) -> None:
        """Stop a running sequence. Its tokens from steps in flight are discarded."""
        sequence.finish_reason = reason
        self._retire()

    def cancel_all(self) -> None:
        """Stop every sequence and drop waiting requests. Tokens from steps in flight are discarded."""
        self._waiting.clear()
        for sequence in self._running:
            sequence.finish_reason = sequence.finish_reason or FinishReason.CANCELLED
        self._retire()

    def _most_in_flight(self, decode_round: DecodeRound | None, prompts_left: bool) -> int:
        """Return how many microbatches may be in flight, at most ``max_in_flight``.

        With a decode round: its number of microbatches, but at least one per stage while prompts run or with drafts.
        Without one: one per stage and one more, which can follow at once.
        """
        num_stages = self._limits.num_stages
        if decode_round is None:
            most = num_stages + 1
        elif prompts_left or self._drafts:
            most = max(decode_round.num_microbatches, num_stages)
        else:
            most = decode_round.num_microbatches
        return min(most, self._limits.max_in_flight)

    def _decode_round(self, decoding: list[Sequence]) -> DecodeRound:
        mean_context = sum(len(sequence.token_ids) for sequence in decoding) // len(decoding)
        return self._policy.decode_round(len(decoding), mean_context)

    def _decode_rows(self, decoding: list[Sequence], decode_round: DecodeRound) -> list[PlannedRow]:
        """Return one microbatch's fraction of the sequences that have a token to plan, longest wait first."""
        num_under_way = sum(microbatch.decodes for microbatch in self._in_flight)
        if len(decoding) > 1 and num_under_way >= decode_round.num_microbatches:
            return []
        ready = sorted(
            (sequence for sequence in decoding if sequence.num_unplanned), key=lambda sequence: sequence.last_plan
        )
        fraction = -(-len(decoding) // decode_round.num_microbatches)
        return [self._decode_row(sequence) for sequence in ready[:fraction]]

    def _decode_row(self, sequence: Sequence) -> PlannedRow:
        position = sequence.num_planned
        token_ids = tuple(sequence.token_ids[position : position + self._limits.chunk_tokens])
        needs_logits = len(token_ids) == sequence.num_unplanned
        return PlannedRow.of(sequence, position, token_ids, is_prompt=False, needs_logits=needs_logits)

    def _draft_rows(self, sequence: Sequence) -> list[PlannedRow]:
        if not self._drafts or sequence.num_unplanned:
            return []
        position = sequence.num_planned
        token_id = sequence.draft()
        if token_id is None:
            return []
        return [PlannedRow.of(sequence, position, (token_id,), is_prompt=False, needs_logits=True)]

    def _add_prompt_rows(self, rows: list[PlannedRow], decode_round: DecodeRound | None) -> None:
        """Add prompt tokens to ``rows``: first of the prompt in progress, then of waiting prompts.

        While sequences decode, only one prompt row is added.
        """
        sequence = self._next_prompt(rows)
        if sequence is None:
            return
        if decode_round is not None:
            rows.append(_prompt_row(sequence, self._beside_decoding(rows, sequence, decode_round)))
            return
        remaining = self._chunk_tokens(sequence)
        while sequence is not None and remaining > 0:
            rows.append(_prompt_row(sequence, remaining))
            remaining -= len(rows[-1].row.token_ids)
            sequence = self._next_prompt(rows) if remaining > 0 else None

    def _next_prompt(self, rows: list[PlannedRow]) -> Sequence | None:
        """Return the sequence whose prompt comes next after ``rows``, in its own slot; None if no prompt can run."""
        planned = [planned.sequence for planned in rows if planned.row.is_prompt]
        for sequence in self._running:
            if sequence.num_prompt_left and sequence not in planned:
                return sequence
        if not self._waiting or not self._slots.num_free:
            return None
        prompt_ids = self._waiting[0].prompt_ids
        choice = self._slots.choose(prompt_ids)
        about_to_be_cached = max((common_prefix(other.token_ids, prompt_ids) for other in planned), default=0)
        if about_to_be_cached >= choice.shared.num_tokens + _WORTH_WAITING:
            return None
        sequence = Sequence(self._waiting.popleft(), choice.slot, self._limits.context_tokens, choice.shared)
        self._slots.acquire(choice.slot, sequence)
        self._running.append(sequence)
        return sequence

    def _chunk_tokens(self, sequence: Sequence) -> int:
        """Return the prompt's chunk length. It is chosen once, and counts the prompts that can follow at once."""
        if sequence.chunk_tokens is None:
            following = islice(self._waiting, self._slots.num_free)
            num_tokens = sequence.num_prompt_left + sum(len(request.prompt_ids) for request in following)
            sequence.chunk_tokens = self._policy.chunk_tokens(
                sequence.num_planned, num_tokens, self._limits.chunk_tokens
            )
        return sequence.chunk_tokens

    def _beside_decoding(self, rows: list[PlannedRow], sequence: Sequence, decode_round: DecodeRound) -> int:
        """Return how many prompt tokens may join ``rows``.

        A round of all microbatches may take at most (1 + CHUNK_DELAY_STEPS) x ``round_s``.
        """
        per_round = max(decode_round.num_microbatches, self._limits.num_stages)
        limit_s = (1 + CHUNK_DELAY_STEPS) * decode_round.round_s / per_round
        load = sum((planned.load for planned in rows), StepLoad())
        return self._policy.chunk_beside(load, sequence.num_planned, self._limits.chunk_tokens, limit_s)

    def _send(self, rows: list[PlannedRow]) -> Microbatch:
        microbatch = Microbatch(self._next_number, tuple(rows))
        self._next_number += 1
        for planned in rows:
            planned.sequence.num_planned = planned.row.end
            planned.sequence.last_plan = microbatch.number
        self._in_flight.append(microbatch)
        return microbatch

    def _retire(self) -> None:
        """Free the slots of finished sequences at once. Plans that reuse the slots are sent after those in flight."""
        for sequence in [sequence for sequence in self._running if sequence.finish_reason is not None]:
            self._running.remove(sequence)
            self._slots.release(sequence.slot)


def _prompt_row(sequence: Sequence, most_tokens: int) -> PlannedRow:
    """Plan the next prompt tokens. The first row also copies the prefix that is shared with another slot."""
    position = sequence.num_planned
    token_ids = sequence.request.prompt_ids[position : position + most_tokens]
    needs_logits = position + len(token_ids) == len(sequence.token_ids)
    copy_from = sequence.shared.copy_from if position == sequence.shared.num_tokens else None
    return PlannedRow.of(sequence, position, token_ids, is_prompt=True, needs_logits=needs_logits, copy_from=copy_from)
