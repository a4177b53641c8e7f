"""Fake stages: a queue of microbatches, and the tokens in each slot's cache. They record every row that is sent.

A sampled token is a function of the tokens in the cache before it, as with a real model. A plan that leaves out a
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
FIRST_PROMPT_ID = 100


def request(num_prompt: int, max_tokens: int = 1000, first: int = 0) -> Request:
    """Return a request with consecutive prompt tokens. Prompts with the same ``first`` begin alike."""
    prompt_ids = tuple(range(FIRST_PROMPT_ID + first, FIRST_PROMPT_ID + first + num_prompt))
    return Request(prompt_ids, max_tokens, Sampling(seed=0), frozenset({STOP_ID}))


requests = st.builds(request, st.integers(1, 30), st.integers(1, 12), st.sampled_from([0, 0, 1, 200]))
limits = st.builds(
    SchedulerLimits,
    num_slots=st.integers(1, 4),
    context_tokens=st.integers(31, 40),
    chunk_tokens=st.integers(1, 12),
    num_stages=st.integers(1, 3),
    prompts_first=st.booleans(),
)
actions = st.lists(st.sampled_from(["submit", "send", "complete", "complete"]), max_size=60)
"""Arguments of ``Run.play``, in the order in which they are performed."""


@dataclass(frozen=True)
class FixedStepPolicy(StepPolicy):
    """A step policy that always makes the same choices."""

    num_microbatches: int
    chunk: int
    """Tokens of a prompt chunk."""
    beside: int
    """Tokens of a prompt chunk that joins decode rows."""

    def decode_round(self, num_sequences: int, mean_context: int) -> DecodeRound:
        return DecodeRound(min(num_sequences, self.num_microbatches), 1.0)

    def chunk_tokens(self, position: int, num_tokens: int, longest: int) -> int:
        return min(self.chunk, longest)

    def chunk_beside(self, load: StepLoad, position: int, longest: int, limit_s: float) -> int:
        return min(self.beside, longest)

    def drafts_are_faster(self) -> bool:
        return True


policies = st.builds(FixedStepPolicy, st.integers(1, 4), st.integers(1, 12), st.integers(1, 12))
UNCHUNKED = FixedStepPolicy(num_microbatches=1, chunk=1000, beside=1000)
"""A policy whose chunks are longer than all prompts."""


@dataclass(frozen=True)
class SentRow:
    """A row, and the known tokens of its sequence when it was sent."""

    row: Row
    sequence: Sequence
    known_ids: tuple[int, ...]


@dataclass
class Run:
    """A scheduler on fake stages."""

    limits: SchedulerLimits
    policy: FixedStepPolicy = UNCHUNKED
    drafts: bool = False
    vocabulary: int = STOP_ID + 1
    """Number of ids that can be sampled: with 1 only id 0."""
    scheduler: Scheduler = field(init=False)
    sent: list[list[SentRow]] = field(default_factory=list)
    """The rows of each microbatch that was sent."""
    max_in_flight: int = 0
    """The largest number of microbatches in flight so far."""
    submitted: list[Request] = field(default_factory=list)
    """The requests of ``play``, in the order of submission."""
    _in_flight: deque[Microbatch] = field(default_factory=deque)
    _caches: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self.limits, self.policy, draft_mode=DraftMode.NGRAM if self.drafts else DraftMode.OFF
        )

    def send(self) -> bool:
        """Send one microbatch and return True, or return False if there is none to send."""
        microbatch = self.scheduler.next_microbatch()
        if microbatch is None:
            return False
        self._in_flight.append(microbatch)
        self.max_in_flight = max(self.max_in_flight, len(self._in_flight))
        self.sent.append(
            [SentRow(planned.row, planned.sequence, tuple(planned.sequence.token_ids)) for planned in microbatch.rows]
        )
        return True

    def complete(self) -> list[AppendedTokens]:
        """Run the oldest microbatch in flight, if there is one, and complete it in the scheduler."""
        if not self._in_flight:
            return []
        microbatch = self._in_flight.popleft()
        sampled = [token_id for planned in microbatch.rows if (token_id := self._run(planned.row)) is not None]
        return self.scheduler.complete(microbatch.number, [SampledToken(token_id) for token_id in sampled])

    def _run(self, row: Row) -> int | None:
        cache = self._caches.setdefault(row.slot, [])
        if row.copy_from is not None:
            cache[: row.position] = self._caches[row.copy_from][: row.position]
        assert len(cache) >= row.position, "a row attends to positions that were never computed"
        cache[row.position : row.end] = row.token_ids
        if not row.needs_logits:
            return None
        digest = hashlib.blake2b(bytes(token_id % 251 for token_id in cache[max(0, row.end - 3) : row.end]))
        digest.update(bytes([sum(cache[: row.end]) % 7]))
        return digest.digest()[0] % self.vocabulary

    def play(self, requests: Iterable[Request], actions: Iterable[str]) -> None:
        """Perform the actions, then submit the requests that are left and run to the end."""
        self.submitted = list(requests)
        not_submitted = deque(self.submitted)
        for action in actions:
            if action == "submit" and not_submitted:
                self.scheduler.submit(not_submitted.popleft())
            elif action == "send":
                self.send()
            elif action == "complete":
                self.complete()
        for request in not_submitted:
            self.scheduler.submit(request)
        self.finish()

    def finish(self) -> None:
        """Send and complete until no work is left."""
        while self.scheduler.has_work:
            while self.send():
                pass
            assert self._in_flight, "the scheduler has work, and sends none"
            self.complete()

    def cancel_all(self) -> None:
        """Stop every waiting and running sequence."""
        for sequence in (*self.scheduler.waiting, *self.scheduler.running):
            self.scheduler.stop(sequence, FinishReason.CANCELLED)

    @property
    def rows(self) -> list[SentRow]:
        """All rows in the order in which they were sent."""
        return [row for microbatch in self.sent for row in microbatch]

    def rows_of(self, sequence: Sequence) -> list[SentRow]:
        """Return the rows of one sequence, in order."""
        return [row for row in self.rows if row.sequence is sequence]

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences in the order of their first rows."""
        return list({id(row.sequence): row.sequence for row in self.rows}.values())
