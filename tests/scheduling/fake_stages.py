"""A scheduler over fake stages: a queue of microbatches and, for each slot, the tokens in its cache.

A sampled token is a function of the tokens in the cache before it, as a real model's is. A plan that leaves out a
position, or relies on a wrong one, therefore changes the answer.
"""

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import strategies as st

from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.cost_model import StepLoad
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.microbatch import Microbatch, Row
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.scheduler import AppendedTokens, Scheduler, SchedulerLimits
from mlx_k2.scheduling.sequence import Sequence
from mlx_k2.scheduling.step_policy import DecodeRound, StepPolicy

STOP_ID = 9
"""Sampled like any other id by the fake stages, so that some sequences stop early."""


def request(num_prompt: int, max_tokens: int = 1000, first_id: int = 100) -> Request:
    """Return a request with the prompt ``first_id``, ``first_id`` + 1 and so on, ``num_prompt`` tokens."""
    prompt_ids = tuple(range(first_id, first_id + num_prompt))
    return Request(prompt_ids, max_tokens, Sampling(seed=0), frozenset({STOP_ID}))


# Half of the prompts begin with 100, so that they share prefixes.
random_requests = st.builds(request, st.integers(1, 30), st.integers(1, 12), st.sampled_from([100, 100, 101, 300]))
random_limits = st.builds(
    SchedulerLimits,
    num_slots=st.integers(1, 4),
    context_tokens=st.integers(31, 40),  # each prompt of up to 30 tokens can run
    chunk_tokens=st.integers(1, 12),
    num_stages=st.integers(1, 3),
    prompts_first=st.booleans(),
)
random_actions = st.lists(st.sampled_from(["submit", "send", "complete", "complete"]), max_size=60)
"""Names of actions for ``SchedulerRun.play``."""


@dataclass(frozen=True)
class FixedStepPolicy(StepPolicy):
    """A step policy with a fixed number of microbatches and fixed lengths of chunks, alone or beside decode rows."""

    num_microbatches: int
    lone_chunk_tokens: int
    beside_chunk_tokens: int

    def decode_round(self, num_sequences: int, mean_context: int) -> DecodeRound:
        return DecodeRound(min(num_sequences, self.num_microbatches), 1.0)

    def chunk_tokens(self, position: int, num_tokens: int, longest: int) -> int:
        return min(self.lone_chunk_tokens, longest)

    def chunk_beside(self, load: StepLoad, position: int, longest: int, limit_s: float) -> int:
        return min(self.beside_chunk_tokens, longest)

    def drafts_are_faster(self) -> bool:
        return True


random_policies = st.builds(FixedStepPolicy, st.integers(1, 4), st.integers(1, 12), st.integers(1, 12))
WHOLE_CHUNKS = FixedStepPolicy(num_microbatches=1, lone_chunk_tokens=1000, beside_chunk_tokens=1000)
"""A prompt is one chunk, unless the scheduler's limits are lower."""


@dataclass(frozen=True)
class SentRow:
    """A row, its sequence, and the tokens that the sequence had when the row was sent."""

    row: Row
    sequence: Sequence
    known_ids: tuple[int, ...]


@dataclass
class SchedulerRun:
    """A scheduler over fake stages, and all rows that it has sent."""

    limits: SchedulerLimits
    policy: FixedStepPolicy = WHOLE_CHUNKS
    has_drafts: bool = False
    """True: with n-gram drafts."""
    vocab_size: int = STOP_ID + 1
    """Number of ids that can be sampled: with 1 only id 0."""
    scheduler: Scheduler = field(init=False)
    microbatches: list[list[SentRow]] = field(default_factory=list)
    """The rows of each microbatch in the order of sending."""
    max_in_flight: int = 0
    """The largest number of microbatches that were in flight at a time."""
    _in_flight: deque[Microbatch] = field(default_factory=deque)
    _caches: dict[int, list[int]] = field(default_factory=dict)  # by slot

    def __post_init__(self) -> None:
        mode = DraftMode.NGRAM if self.has_drafts else DraftMode.OFF
        self.scheduler = Scheduler(self.limits, self.policy, draft_mode=mode)

    def send(self) -> bool:
        """Send one microbatch and return True, or return False if there is none to send."""
        microbatch = self.scheduler.next_microbatch()
        if microbatch is None:
            return False
        self._in_flight.append(microbatch)
        self.max_in_flight = max(self.max_in_flight, len(self._in_flight))
        self.microbatches.append(
            [SentRow(planned.row, planned.sequence, tuple(planned.sequence.token_ids)) for planned in microbatch.rows]
        )
        return True

    def complete(self) -> list[AppendedTokens]:
        """Execute the oldest microbatch in flight, if there is one, and complete it in the scheduler."""
        if not self._in_flight:
            return []
        microbatch = self._in_flight.popleft()
        sampled_ids = [token_id for planned in microbatch.rows if (token_id := self._execute(planned.row)) is not None]
        return self.scheduler.complete(microbatch.number, [SampledToken(token_id) for token_id in sampled_ids])

    def _execute(self, row: Row) -> int | None:
        """Write a row to the cache; return the sampled token, if the row needs logits."""
        cache = self._caches.setdefault(row.slot, [])
        if row.copy_from is not None:
            cache[: row.position] = self._caches[row.copy_from][: row.position]
        assert len(cache) >= row.position, "a row attends to positions that were never computed"
        cache[row.position : row.end] = row.token_ids
        if not row.needs_logits:
            return None
        # A hash of the last three tokens and of the sum of all. Bytes are below 256, hence the remainders.
        digest = hashlib.blake2b(bytes(token_id % 251 for token_id in cache[max(0, row.end - 3) : row.end]))
        digest.update(bytes([sum(cache[: row.end]) % 7]))
        return digest.digest()[0] % self.vocab_size

    def play(self, requests: Iterable[Request], actions: Iterable[str]) -> None:
        """Perform the actions, each "submit" with the next request; then submit the other requests and finish."""
        unsubmitted = deque(requests)
        for action in actions:
            if action == "submit" and unsubmitted:
                self.scheduler.submit(unsubmitted.popleft())
            elif action == "send":
                self.send()
            elif action == "complete":
                self.complete()
        for request in unsubmitted:
            self.scheduler.submit(request)
        self.finish()

    def finish(self) -> None:
        """Send and complete until no work is left."""
        while self.scheduler.has_work:
            while self.send():
                pass
            assert self._in_flight, "the scheduler has work and sends no plan"
            self.complete()

    def cancel_all(self) -> None:
        """Stop every waiting and running sequence."""
        for sequence in (*self.scheduler.waiting, *self.scheduler.running):
            self.scheduler.stop(sequence, FinishReason.CANCELLED)

    @property
    def rows(self) -> list[SentRow]:
        """All rows in the order in which they were sent."""
        return [row for microbatch in self.microbatches for row in microbatch]

    def rows_of(self, sequence: Sequence) -> list[SentRow]:
        """Return the rows of one sequence, in order."""
        return [row for row in self.rows if row.sequence is sequence]

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences in the order of their first rows."""
        return list({id(row.sequence): row.sequence for row in self.rows}.values())
