"""Scheduler: picks the next microbatch. Knows no arrays and no machines; all timing comes from the step policy.

Decoding sequences alternate in the number of microbatches that is predicted to be fastest. Prompts run in order of
arrival, in chunks that do not wait for each other, so that they overlap across stages. While other sequences decode,
chunks are short enough to limit their delay. With drafts enabled, a lone sequence's idle stages run draft tokens.
Background sequences are planned only while no interactive one waits or runs, and yield their slots.
"""

from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from itertools import islice

from mlx_k2.sampling import SampledToken
from mlx_k2.scheduling.cost_model import StepLoad
from mlx_k2.scheduling.draft_switch import DraftSwitch
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.microbatch import Microbatch, PlannedRow
from mlx_k2.scheduling.request import FinishReason, Priority, Request
from mlx_k2.scheduling.sequence import INDEX_TOKENS, Appended, Sequence
from mlx_k2.scheduling.slots import SlotPool, common_prefix
from mlx_k2.scheduling.step_policy import CHUNK_DELAY_STEPS, DecodeRound, StepPolicy
from mlx_k2.scheduling.token_policy import TokenPolicy

_WORTH_WAITING = 32
"""A prompt is postponed if this microbatch will cache at least this many more of its tokens than are cached now."""


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
        """Maximum number of microbatches in flight."""
        return 2 * self.num_stages


@dataclass(frozen=True)
class TokensAppended:
    """Tokens that were appended to a sequence. None if the sequence had ended, or if a draft before them was wrong."""

    sequence: Sequence
    appended: tuple[Appended, ...]


class Scheduler:
    """Waiting and running sequences, and microbatches in flight."""

    def __init__(self, limits: SchedulerLimits, policy: StepPolicy, *, draft_mode: DraftMode = DraftMode.OFF) -> None:
        """``draft_mode`` AUTO and MODEL are for stages with a draft head."""
        self.limits = limits
        self._policy = policy
        self._draft_mode = draft_mode
        self._switch = DraftSwitch(policy.drafts_pay) if self._draft_mode is DraftMode.AUTO else None
        self._last_sampled: tuple[Sequence, float] | None = None
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
    def running(self) -> Tokens[Sequence]:
        """The sequences that have a slot, in the order in which they started."""
        return tuple(self._running)

    def submit(self, request: Request, policy: TokenPolicy | None = None) -> TokensAppended:
        """Queue a request; return its sequence and the tokens that its policy forces before any is sampled.

        Requests of one priority start in the order of submission, when a slot is free.
        """
        sequence = Sequence(request, self.limits.context_tokens, policy, self._draft_mode)
        self._waiting[request.priority].append(sequence)
        appended = sequence.append_forced()
        self._retire()
        return TokensAppended(sequence, tuple(appended))

    def next_microbatch(self) -> Microbatch | None:
        """Return the next microbatch to send; None if no row can run or enough microbatches are in flight."""
        active = self._active()
        decoding = [sequence for sequence in active if sequence.num_prompt_left == 0]
        prompts_left = len(decoding) < len(active) or self._next_waiting() is not None
        waits = prompts_left and self.limits.prompts_first
        decode_round = None
        if decoding and not waits:
            mean_context = sum(len(sequence.token_ids) for sequence in decoding) // len(decoding)
            decode_round = self._policy.decode_round(len(decoding), mean_context)
        if len(self._in_flight) >= self._most_in_flight(active, decode_round, prompts_left):
            return None
        rows = [] if decode_round is None else self._decode_rows(decoding, decode_round)
        if prompts_left:
            self._add_prompt_rows(rows, decode_round)
        if not rows and len(decoding) == 1 and not prompts_left:
            rows = self._draft_rows(decoding[0])
        return self._send(rows) if rows else None

    def complete(
        self, number: int, tokens: Tokens[SampledToken], *, is_skipped: bool = False, now: float = 0.0
    ) -> list[TokensAppended]:
        """Append the tokens that a step sampled, one per row with ``needs_logits``, each to its sequence.

        A step that the last stage skipped was a wrong draft, and has no tokens. ``now``: the time of arrival.
        """
        microbatch = self._in_flight.popleft()
        sampled_sequences = [planned.sequence for planned in microbatch.rows if planned.row.needs_logits]
        if is_skipped:
            sampled_sequences.clear()
        assert microbatch.number == number, f"step {number} was reported before step {microbatch.number}"
        assert len(sampled_sequences) == len(tokens), (
            f"step {number} sampled {len(tokens)} tokens, not {len(sampled_sequences)}"
        )
        completed = [
            TokensAppended(sequence, tuple(sequence.append_sampled(number, token, self._next_number)))
            for sequence, token in zip(sampled_sequences, tokens, strict=True)
        ]
        if any(one.appended for one in completed):
            self._time_token(microbatch, now)
        self._retire()
        return completed

    def propose(self, microbatch: Microbatch, token_ids: Tokens[int]) -> None:
        """Take the draft head's tokens after the one that a step of a lone sequence sampled."""
        (planned,) = microbatch.rows
        planned.sequence.propose(microbatch.number, token_ids)

    def pop_ended(self) -> list[Sequence]:
        """Return the sequences that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def reset(self) -> None:
        """Plan every running sequence again from its first token. Call it when new stages with empty caches start."""
        self._in_flight.clear()
        self._last_sampled = None
        self._slots.forget()
        for sequence in self._running:
            sequence.reset(self._next_number)

    def stop(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a waiting or running sequence. Its tokens from steps in flight are discarded."""
        sequence.finish_reason = sequence.finish_reason or reason
        self._retire()

    def index_drafts(self) -> bool:
        """Index some tokens of a lone sequence for its drafts; return whether some are left."""
        active = self._active()
        if self._draft_mode in (DraftMode.OFF, DraftMode.MODEL) or len(active) != 1:
            return False
        (sequence,) = active
        return sequence.drafter.index(sequence.token_ids, INDEX_TOKENS)

    def _active(self) -> list[Sequence]:
        """Return the running sequences that may be planned: no background ones while there are interactive requests."""
        interactive = [sequence for sequence in self._running if sequence.is_interactive]
        return interactive if interactive or self._waiting[Priority.INTERACTIVE] else self._running

    def _next_waiting(self) -> Sequence | None:
        """Return the waiting sequence that can start now, if any. An interactive one may take a background slot."""
        interactive, brief, background = (self._waiting[priority] for priority in Priority)
        if interactive or brief:
            has_slot = self._slots.num_free or any(not sequence.is_interactive for sequence in self._running)
            first = interactive[0] if interactive else brief[0]
            return first if has_slot and not self._waits_for_brief(first) else None
        if background and self._slots.num_free and not any(sequence.is_interactive for sequence in self._running):
            return background[0]
        return None

    def _waits_for_brief(self, sequence: Sequence) -> bool:
        """Return whether a brief sequence leaves a conversation cached, and uses the slot of a running one next."""
        if sequence.request.priority is not Priority.BRIEF or not self._slots.num_free:
            return False
        if all(running.request.priority is not Priority.BRIEF for running in self._running):
            return False
        most = sequence.num_prompt + sequence.request.max_tokens
        return self._slots.choose(sequence.prompt_ids, ages=False).num_lost > most

    def _most_in_flight(self, active: Tokens[Sequence], decode_round: DecodeRound | None, prompts_left: bool) -> int:
        """Return how many microbatches may be in flight, at most ``max_in_flight``.

        With a decode round: its number of microbatches, but at least one per stage while prompts run or with drafts.
        Without one, and for background sequences: one per stage and one more, which can follow at once.
        """
        num_stages = self.limits.num_stages
        if decode_round is None:
            most = num_stages + 1
        elif prompts_left or self._is_drafting:
            most = max(decode_round.num_microbatches, num_stages)
        else:
            most = decode_round.num_microbatches
        if not any(sequence.is_interactive for sequence in active):
            most = min(most, num_stages + 1)
        return min(most, self.limits.max_in_flight)

    def _decode_rows(self, decoding: list[Sequence], decode_round: DecodeRound) -> list[PlannedRow]:
        """Return one microbatch's fraction of the sequences that have a token to plan, longest wait first.

        After a restart a row replays many tokens. The rows together have at most ``chunk_tokens``.
        """
        num_under_way = sum(microbatch.decodes for microbatch in self._in_flight)
        if len(decoding) > 1 and num_under_way >= decode_round.num_microbatches:
            return []
        ready = sorted(
            (sequence for sequence in decoding if sequence.num_unplanned), key=lambda sequence: sequence.last_plan
        )
        fraction = -(-len(decoding) // decode_round.num_microbatches)
        rows: list[PlannedRow] = []
        remaining = self.limits.chunk_tokens
        for sequence in ready[:fraction]:
            if not remaining:
                break
            rows.append(_row(sequence, remaining))
            remaining -= len(rows[-1].row.token_ids)
        return rows

    @property
    def _is_drafting(self) -> bool:
        return self._draft_mode is not DraftMode.OFF and (self._switch is None or self._switch.is_on)

    def _time_token(self, microbatch: Microbatch, now: float) -> None:
        """Measure the time since the token before, if only one token of a sequence that runs alone was computed."""
        sequence, row = microbatch.rows[0].sequence, microbatch.rows[0].row
        last, self._last_sampled = self._last_sampled, (sequence, now)
        if self._switch is None or last is None or len(self._active()) > 1 or row.is_prompt or len(row.token_ids) > 1:
            return
        last_sequence, sampled_at = last
        if last_sequence is sequence and now > sampled_at:
            self._switch.observe(now - sampled_at)

    def _draft_rows(self, sequence: Sequence) -> list[PlannedRow]:
        if not self._is_drafting or sequence.num_unplanned:
            return []
        token_id = sequence.draft()
        return [] if token_id is None else [PlannedRow.of(sequence, (token_id,), is_draft=True)]

    def _add_prompt_rows(self, rows: list[PlannedRow], decode_round: DecodeRound | None) -> None:
        """Add prompt tokens to ``rows``: first of the prompt in progress, then of waiting prompts.

        While sequences decode, only one prompt row is added. All rows together have at most ``chunk_tokens``.
        """
        budget = self.limits.chunk_tokens - sum(len(planned.row.token_ids) for planned in rows)
        sequence = self._next_prompt(rows) if budget else None
        if sequence is None:
            return
        if decode_round is not None:
            rows.append(_row(sequence, self._tokens_while_decoding(rows, sequence, decode_round, budget)))
            return
        remaining = min(budget, self._chunk_tokens(sequence))
        while sequence is not None and remaining > 0:
            rows.append(_row(sequence, remaining))
            remaining -= len(rows[-1].row.token_ids)
            sequence = self._next_prompt(rows) if remaining > 0 else None

    def _next_prompt(self, rows: list[PlannedRow]) -> Sequence | None:
        """Return the sequence whose prompt comes next after ``rows``, in its own slot; None if no prompt can run."""
        planned = [planned.sequence for planned in rows if planned.row.is_prompt]
        for running in self._active():
            if running.num_prompt_left and running not in planned:
                return running
        sequence = self._next_waiting()
        if sequence is None:
            return None
        if not self._slots.num_free:
            self._suspend_background()
        prompt_ids = sequence.prompt_ids
        choice = self._slots.choose(prompt_ids, ages=sequence.request.priority is Priority.INTERACTIVE)
        about_to_be_cached = max((common_prefix(other.token_ids, prompt_ids) for other in planned), default=0)
        if about_to_be_cached >= choice.shared.num_tokens + _WORTH_WAITING:
            return None
        self._waiting[sequence.request.priority].popleft()
        self._slots.acquire(choice, sequence)
        self._running.append(sequence)
        return sequence

    def _suspend_background(self) -> None:
        """Free the slot of the background sequence that started last. It waits as the first of its priority."""
        sequence = next(sequence for sequence in reversed(self._running) if not sequence.is_interactive)
        self._release(sequence)
        sequence.reset(self._next_number)
        sequence.slot = None
        self._waiting[Priority.BACKGROUND].appendleft(sequence)

    def _chunk_tokens(self, sequence: Sequence) -> int:
        """Return the prompt's chunk length. It is chosen once, and counts the prompts that can follow at once."""
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
        """Return how many prompt tokens, at most ``longest``, may join ``rows``.

        A round of all microbatches may take at most (1 + CHUNK_DELAY_STEPS) x ``round_s``.
        """
        per_round = max(decode_round.num_microbatches, self.limits.num_stages)
        limit_s = (1 + CHUNK_DELAY_STEPS) * decode_round.round_s / per_round
        load = sum((planned.load for planned in rows), StepLoad())
        return self._policy.chunk_beside(load, sequence.num_planned, longest, limit_s)

    def _send(self, rows: list[PlannedRow]) -> Microbatch:
        if self._asks_for_drafts(rows):
            rows = [rows[0].with_draft_request(self.limits.num_stages - 1)]
        microbatch = Microbatch(self._next_number, tuple(rows))
        self._next_number += 1
        for planned in rows:
            planned.sequence.num_planned = planned.row.end
            planned.sequence.last_plan = microbatch.number
        self._in_flight.append(microbatch)
        return microbatch

    def _asks_for_drafts(self, rows: list[PlannedRow]) -> bool:
        """Return whether the draft head follows this step: it samples a token of a sequence that runs alone."""
        if not self._draft_mode.uses_head or len(self._active()) != 1 or not self._is_drafting:
            return False
        is_alone = len(rows) == 1 and self._next_waiting() is None
        return is_alone and rows[0].row.needs_logits and self.limits.num_stages > 1

    def _retire(self) -> None:
        """Free the slots of finished sequences at once. Plans that reuse the slots are sent after those in flight."""
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


def _row(sequence: Sequence, most_tokens: int) -> PlannedRow:
    """Plan the next known tokens of a prompt or an answer.

    A prompt's first row also copies the prefix that is shared with another slot.
    """
    position = sequence.num_planned
    end = sequence.num_prompt if sequence.num_prompt_left else len(sequence.token_ids)
    token_ids = tuple(sequence.token_ids[position : min(end, position + most_tokens)])
    copy_from = sequence.shared.copy_from if position == sequence.shared.num_tokens else None
    return PlannedRow.of(sequence, token_ids, copy_from=copy_from)
