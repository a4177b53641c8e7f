"""Scheduler: picks the next microbatch. Knows no arrays and no machines; all timing comes from the step policy.

Decoding sequences are divided into the number of microbatches that is predicted to be fastest. Prompts run in order of
priority, then of arrival, in chunks that do not wait for each other, so that they overlap across stages. While other
sequences decode, chunks are short enough to limit the decode rounds' delay. While one sequence runs alone, idle stages
compute its draft tokens, if drafts are enabled. Background sequences are planned only while no interactive one waits
and no interactive or brief one runs, and they give up their slots to interactive and brief ones.
"""

import math
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import islice

from mlx_k2.sampling import SampledToken
from mlx_k2.scheduling.cost_model import StepLoad
from mlx_k2.scheduling.draft_switch import DraftSwitch
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.microbatch import Microbatch, PlannedRow
from mlx_k2.scheduling.request import FinishReason, Priority, Request
from mlx_k2.scheduling.sequence import INDEX_TOKENS, AppendedToken, Sequence
from mlx_k2.scheduling.slots import SlotPool, common_prefix
from mlx_k2.scheduling.step_policy import CHUNK_DELAY_STEPS, DecodeRound, StepPolicy
from mlx_k2.scheduling.token_policy import TokenPolicy

_MIN_TOKENS_TO_WAIT_FOR = 32
"""A prompt is postponed if it shares at least this many more tokens with a prompt in the microbatch being planned than
with any slot: to copy their cache later costs less than to compute them twice."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits of the scheduler. ``chunk_tokens`` is the maximum number of tokens in one microbatch."""

    num_slots: int
    context_tokens: int
    chunk_tokens: int
    num_stages: int
    prompts_first: bool = False
    """Run all prefill before decode (offline throughput mode): more tokens per second in total."""

    @property
    def max_in_flight(self) -> int:
        """Maximum number of microbatches in flight: one that each stage computes, and one that waits for it."""
        return 2 * self.num_stages


@dataclass(frozen=True)
class AppendedTokens:
    """Tokens that a submission or a step appended to a sequence; none if the step did not count any more."""

    sequence: Sequence
    tokens: tuple[AppendedToken, ...]


class Scheduler:
    """Waiting and running sequences, and microbatches in flight."""

    def __init__(self, limits: SchedulerLimits, policy: StepPolicy, *, draft_mode: DraftMode = DraftMode.OFF) -> None:
        """``draft_mode`` AUTO and MODEL need stages with a draft head."""
        self.limits = limits
        self._policy = policy
        self._draft_mode = draft_mode
        self._draft_switch = DraftSwitch(policy.drafts_are_faster) if draft_mode is DraftMode.AUTO else None
        self._last_sampled: tuple[Sequence | None, float] = (None, 0.0)
        """The sequence of the last sampled token, if any, and the token's time of arrival in seconds."""
        self._waiting: dict[Priority, deque[Sequence]] = {priority: deque() for priority in Priority}
        self._slots = SlotPool(limits.num_slots)
        self._running: list[Sequence] = []
        self._ended: list[Sequence] = []
        self._in_flight: deque[Microbatch] = deque()
        self._next_number = 0

    @property
    def has_work(self) -> bool:
        """True if anything is waiting, running or in flight."""
        return bool(self._running or self._in_flight or any(self._waiting.values()))

    @property
    def waiting(self) -> list[Sequence]:
        """The sequences that wait for a slot, in the order in which they start."""
        return [sequence for priority in Priority for sequence in self._waiting[priority]]

    @property
    def running(self) -> SequenceOf[Sequence]:
        """The sequences that have a slot, in the order in which they started."""
        return tuple(self._running)

    def submit(self, request: Request, policy: TokenPolicy | None = None) -> AppendedTokens:
        """Queue a request; return its sequence and the tokens that its policy forces before any is sampled.

        Requests of one priority start in the order of submission, when a slot is free.
        """
        sequence = Sequence(request, self.limits.context_tokens, policy, self._draft_mode)
        self._waiting[request.priority].append(sequence)
        appended = sequence.append_forced()
        self._remove_ended()
        return AppendedTokens(sequence, tuple(appended))

    def next_microbatch(self) -> Microbatch | None:
        """Return the next microbatch to send; None if no row can run or enough microbatches are in flight."""
        active = self._active()
        decoding = [sequence for sequence in active if sequence.num_prompt_left == 0]
        has_prompts = len(decoding) < len(active) or self._next_waiting() is not None
        decode_waits = has_prompts and self.limits.prompts_first
        decode_round = None
        if decoding and not decode_waits:
            mean_context = sum(len(sequence.token_ids) for sequence in decoding) // len(decoding)
            decode_round = self._policy.decode_round(len(decoding), mean_context)
        if len(self._in_flight) >= self._max_in_flight(active, decode_round, has_prompts):
            return None
        rows = [] if decode_round is None else self._decode_rows(decoding, decode_round)
        if has_prompts:
            self._add_prompt_rows(rows, decode_round)
        if not rows and len(decoding) == 1 and not has_prompts:
            rows = self._draft_rows(decoding[0])
        return self._send(rows) if rows else None

    def complete(
        self, number: int, tokens: SequenceOf[SampledToken], *, is_skipped: bool = False, now: float = 0.0
    ) -> list[AppendedTokens]:
        """Append the tokens that a step sampled, one per row with ``needs_logits``, each to its sequence.

        ``is_skipped``: the step was a wrong draft, so the last stage skipped it and sampled nothing. ``now``: time at
        which the report arrived, in seconds on any clock; without it no time is measured.
        """
        microbatch = self._in_flight.popleft()
        assert microbatch.number == number, f"step {number} was reported before step {microbatch.number}"
        rows = () if is_skipped else microbatch.rows
        sequences = [planned.sequence for planned in rows if planned.row.needs_logits]
        assert len(sequences) == len(tokens), f"step {number} sampled {len(tokens)} tokens, not {len(sequences)}"
        appended = [
            AppendedTokens(sequence, tuple(sequence.append_sampled(number, token, self._next_number)))
            for sequence, token in zip(sequences, tokens, strict=True)
        ]
        if any(each.tokens for each in appended):
            self._observe_token_time(microbatch, now)
        self._remove_ended()
        return appended

    def propose(self, microbatch: Microbatch, token_ids: SequenceOf[int]) -> None:
        """Store the draft head's tokens for the positions after the token that a lone sequence's step sampled."""
        (planned,) = microbatch.rows
        planned.sequence.propose(microbatch.number, token_ids)

    def pop_ended(self) -> list[Sequence]:
        """Return the sequences that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def reset(self) -> None:
        """Plan every running sequence again from its first token. Call this when new stages with empty caches start."""
        self._in_flight.clear()
        self._last_sampled = (None, 0.0)
        self._slots.clear_caches()
        for sequence in self._running:
            sequence.reset(self._next_number)

    def stop(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a waiting or running sequence. Its tokens from steps in flight are discarded."""
        sequence.finish_reason = sequence.finish_reason or reason
        self._remove_ended()

    def index_drafts(self) -> bool:
        """Index up to INDEX_TOKENS more tokens of a lone sequence for n-gram drafts; return whether some are left."""
        active = self._active()
        if self._draft_mode in (DraftMode.OFF, DraftMode.MODEL) or len(active) != 1:
            return False
        (sequence,) = active
        return sequence.drafter.index(sequence.token_ids, INDEX_TOKENS)

    def _active(self) -> list[Sequence]:
        """Return the running sequences, without background ones if another one runs or an interactive one waits."""
        others = [sequence for sequence in self._running if not sequence.is_background]
        return others if others or self._waiting[Priority.INTERACTIVE] else self._running

    def _next_waiting(self) -> Sequence | None:
        """Return the waiting sequence that can start now, if any. It may use the slot of a background sequence."""
        interactive, brief, background = (self._waiting[priority] for priority in Priority)
        num_background = sum(sequence.is_background for sequence in self._running)
        if interactive or brief:
            has_slot = self._slots.num_free or num_background
            first = interactive[0] if interactive else brief[0]
            return first if has_slot and not self._waits_for_brief(first) else None
        if background and self._slots.num_free and num_background == len(self._running):
            return background[0]
        return None

    def _waits_for_brief(self, sequence: Sequence) -> bool:
        """Return whether a brief sequence waits for the slot of a running brief one.

        It does if every free slot would lose more cached tokens than the sequence can have.
        """
        if sequence.request.priority is not Priority.BRIEF or not self._slots.num_free:
            return False
        if all(running.request.priority is not Priority.BRIEF for running in self._running):
            return False
        max_tokens = sequence.num_prompt + sequence.request.max_tokens
        return self._slots.choose(sequence.prompt_ids, use_ages=False).num_lost > max_tokens

    def _max_in_flight(self, active: SequenceOf[Sequence], decode_round: DecodeRound | None, has_prompts: bool) -> int:
        """Return how many microbatches may be in flight, at most ``limits.max_in_flight``.

        With a decode round: its number of microbatches, but at least one per stage while prompts run or with drafts.
        Without a decode round: one more than there are stages. Background sequences never have more than that.
        """
        num_stages = self.limits.num_stages
        if decode_round is None:
            limit = num_stages + 1
        elif has_prompts or self._is_drafting:
            limit = max(decode_round.num_microbatches, num_stages)
        else:
            limit = decode_round.num_microbatches
        if all(sequence.is_background for sequence in active):
            limit = min(limit, num_stages + 1)
        return min(limit, self.limits.max_in_flight)

    def _decode_rows(self, decoding: list[Sequence], decode_round: DecodeRound) -> list[PlannedRow]:
        """Return the decode rows of one microbatch: an even part of ``decoding``, those that waited longest first.

        After forced tokens or a restart a row has several tokens. Together the rows have at most ``chunk_tokens``. A
        lone sequence's next token does not wait for its steps in flight, since these may all be wrong drafts.
        """
        num_decode_steps = sum(microbatch.decodes for microbatch in self._in_flight)
        if len(decoding) > 1 and num_decode_steps >= decode_round.num_microbatches:
            return []
        ready = [sequence for sequence in decoding if sequence.num_unplanned]
        ready.sort(key=lambda sequence: sequence.last_plan)
        max_rows = math.ceil(len(decoding) / decode_round.num_microbatches)
        rows: list[PlannedRow] = []
        remaining = self.limits.chunk_tokens
        for sequence in ready[:max_rows]:
            if not remaining:
                break
            rows.append(_known_tokens_row(sequence, remaining))
            remaining -= len(rows[-1].row.token_ids)
        return rows

    @property
    def _is_drafting(self) -> bool:
        """True if a sequence that runs alone gets drafts now."""
        if self._draft_switch is not None:
            return self._draft_switch.is_on
        return self._draft_mode is not DraftMode.OFF

    def _observe_token_time(self, microbatch: Microbatch, now: float) -> None:
        """Pass the time since the last token to the draft switch, if a lone sequence's step computed one token."""
        sequence, row = microbatch.rows[0].sequence, microbatch.rows[0].row
        (last_sequence, sampled_at), self._last_sampled = self._last_sampled, (sequence, now)
        if self._draft_switch is None or last_sequence is not sequence or now <= sampled_at:
            return
        if len(self._active()) == 1 and not row.is_prompt and len(row.token_ids) == 1:
            self._draft_switch.observe(now - sampled_at)

    def _draft_rows(self, sequence: Sequence) -> list[PlannedRow]:
        """Return one row with a draft token; no row if there is no draft or a known token comes first."""
        if not self._is_drafting or sequence.num_unplanned:
            return []
        token_id = sequence.draft()
        return [] if token_id is None else [PlannedRow.of(sequence, (token_id,), is_draft=True)]

    def _add_prompt_rows(self, rows: list[PlannedRow], decode_round: DecodeRound | None) -> None:
        """Add prompt tokens to ``rows``: first of prompts in progress, then of waiting prompts.

        While sequences decode, only one prompt row is added. All rows together have at most ``chunk_tokens``.
        """
        budget = self.limits.chunk_tokens - sum(len(planned.row.token_ids) for planned in rows)
        sequence = self._next_prompt(rows) if budget else None
        if sequence is None:
            return
        if decode_round is not None:
            rows.append(_known_tokens_row(sequence, self._tokens_while_decoding(rows, sequence, decode_round, budget)))
            return
        remaining = min(budget, self._chunk_tokens(sequence))
        while sequence is not None and remaining > 0:
            rows.append(_known_tokens_row(sequence, remaining))
            remaining -= len(rows[-1].row.token_ids)
            sequence = self._next_prompt(rows) if remaining > 0 else None

    def _next_prompt(self, rows: list[PlannedRow]) -> Sequence | None:
        """Return the sequence whose prompt comes next after ``rows``, if any can run. If it waits, start it."""
        planned_prompts = [planned.sequence for planned in rows if planned.row.is_prompt]
        for running in self._active():
            if running.num_prompt_left and running not in planned_prompts:
                return running
        sequence = self._next_waiting()
        if sequence is None:
            return None
        if not self._slots.num_free:
            self._suspend_background()
        prompt_ids = sequence.prompt_ids
        choice = self._slots.choose(prompt_ids, use_ages=sequence.request.priority is Priority.INTERACTIVE)
        num_cached_soon = max((common_prefix(other.token_ids, prompt_ids) for other in planned_prompts), default=0)
        if num_cached_soon >= choice.shared.num_tokens + _MIN_TOKENS_TO_WAIT_FOR:
            return None
        self._waiting[sequence.request.priority].popleft()
        self._slots.acquire(choice, sequence)
        self._running.append(sequence)
        return sequence

    def _suspend_background(self) -> None:
        """Free the slot of the background sequence that started last, and put it first in its waiting queue."""
        sequence = next(sequence for sequence in reversed(self._running) if sequence.is_background)
        self._release(sequence)
        sequence.reset(self._next_number)
        sequence.slot = None
        self._waiting[Priority.BACKGROUND].appendleft(sequence)

    def _chunk_tokens(self, sequence: Sequence) -> int:
        """Return the prompt's chunk length, chosen once for this prompt and those that can start right after it."""
        if sequence.chunk_tokens is None:
            following = islice(self._waiting[sequence.request.priority], self._slots.num_free)
            num_tokens = sequence.num_prompt_left + sum(other.num_prompt for other in following)
            sequence.chunk_tokens = self._policy.chunk_tokens(
                sequence.num_planned, num_tokens, self.limits.chunk_tokens
            )
        return sequence.chunk_tokens

    def _tokens_while_decoding(
        self, rows: list[PlannedRow], sequence: Sequence, decode_round: DecodeRound, longest: int
    ) -> int:
        """Return how many of the sequence's prompt tokens, at most ``longest``, may join ``rows``.

        With them a decode round is predicted to take at most (1 + CHUNK_DELAY_STEPS) x ``round_s``. At least one may.
        """
        num_microbatches = max(decode_round.num_microbatches, self.limits.num_stages)
        limit_s = (1 + CHUNK_DELAY_STEPS) * decode_round.round_s / num_microbatches
        load = sum((planned.load for planned in rows), StepLoad())
        return self._policy.chunk_beside(load, sequence.num_planned, longest, limit_s)

    def _send(self, rows: list[PlannedRow]) -> Microbatch:
        """Return the microbatch of ``rows``, which is in flight from now on."""
        if self._needs_draft_request(rows):
            rows = [rows[0].with_draft_request(self.limits.num_stages - 1)]
        microbatch = Microbatch(self._next_number, tuple(rows))
        self._next_number += 1
        for planned in rows:
            planned.sequence.num_planned = planned.row.end
            planned.sequence.last_plan = microbatch.number
        self._in_flight.append(microbatch)
        return microbatch

    def _needs_draft_request(self, rows: list[PlannedRow]) -> bool:
        """Return whether the draft head runs after this step: the step samples a token of a lone sequence.

        The head drafts one token for each stage but one. A single stage is never idle, so it gets no drafts.
        """
        if not self._draft_mode.uses_head or len(self._active()) != 1 or not self._is_drafting:
            return False
        is_alone = len(rows) == 1 and self._next_waiting() is None
        return is_alone and rows[0].row.needs_logits and self.limits.num_stages > 1

    def _remove_ended(self) -> None:
        """Move ended sequences to ``_ended``, and free their slots: steps in flight run before any later plan."""
        for sequence in [sequence for sequence in self._running if sequence.finish_reason is not None]:
            self._release(sequence)
            self._ended.append(sequence)
        for waiting in self._waiting.values():
            for sequence in [sequence for sequence in waiting if sequence.finish_reason is not None]:
                waiting.remove(sequence)
                self._ended.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None, "a running sequence has a slot"
        self._running.remove(sequence)
        self._slots.release(sequence.slot)


def _known_tokens_row(sequence: Sequence, max_tokens: int) -> PlannedRow:
    """Return a row of the next known tokens of a prompt or an answer.

    A prompt's first row also copies the prefix that is shared with another slot.
    """
    position = sequence.num_planned
    end = sequence.num_prompt if sequence.num_prompt_left else len(sequence.token_ids)
    token_ids = tuple(sequence.token_ids[position : min(end, position + max_tokens)])
    copy_from = sequence.shared.copy_from if position == sequence.shared.num_tokens else None
    return PlannedRow.of(sequence, token_ids, copy_from=copy_from)
