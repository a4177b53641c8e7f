"""Stages that are only a queue: a scheduler is driven over them, and all that it sends is noted."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hypothesis import strategies as st

from mlx_k2.engine.microbatch import Microbatch, MicrobatchRow
from mlx_k2.engine.request import Request
from mlx_k2.engine.scheduler import Scheduler, SchedulerLimits
from mlx_k2.engine.sequence import Sequence
from mlx_k2.sampling import Sampling

STOP_ID = 9
"""Drawn like any other id by the made-up stages, so that some sequences stop early."""


def request(num_prompt: int, max_tokens: int = 1000) -> Request:
    return Request(tuple(100 + i for i in range(num_prompt)), max_tokens, Sampling(seed=0), frozenset({STOP_ID}))


requests = st.builds(request, st.integers(1, 30), st.integers(1, 12))
limits = st.builds(
    SchedulerLimits,
    num_slots=st.integers(1, 3),
    context_tokens=st.integers(31, 40),
    chunk_tokens=st.integers(1, 12),
    max_in_flight=st.integers(1, 4),
)
actions = st.lists(st.sampled_from(["submit", "send", "complete", "complete"]), max_size=60)
"""What happens in which order; when it is all done, the run goes on to its end."""


@dataclass(frozen=True)
class SentRow:
    """A row, and what was known of its sequence when it was sent."""

    row: MicrobatchRow
    slot: int
    token_ids: tuple[int, ...]
    known_ids: tuple[int, ...]


@dataclass
class Run:
    """A scheduler at work. ``sent`` holds every row of every microbatch, ``most_in_flight`` the most at any time."""

    limits: SchedulerLimits
    drawn: Iterator[int]
    scheduler: Scheduler = field(init=False)
    sent: list[list[SentRow]] = field(default_factory=list)
    most_in_flight: int = 0
    _in_flight: deque[Microbatch] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)

    def send(self) -> bool:
        """Send one microbatch, if there is one to send."""
        microbatch = self.scheduler.next_microbatch()
        if microbatch is None:
            return False
        self._in_flight.append(microbatch)
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        self.sent.append(
            [SentRow(row, row.sequence.slot, row.token_ids, tuple(row.sequence.token_ids)) for row in microbatch.rows]
        )
        return True

    def complete(self) -> tuple[Sequence | None, ...]:
        """Let the stages finish the oldest microbatch, if one is in flight."""
        if not self._in_flight:
            return ()
        microbatch = self._in_flight.popleft()
        num_drawn = sum(row.draws_token for row in microbatch.rows)
        return self.scheduler.complete(microbatch.number, [next(self.drawn) for _ in range(num_drawn)])

    def play(self, asked: Iterable[Request], actions: Iterable[str]) -> None:
        """Act as told; then submit what is left and go on to the end."""
        waiting = deque(asked)
        for action in actions:
            if action == "submit" and waiting:
                self.scheduler.submit(waiting.popleft())
            elif action == "send":
                self.send()
            elif action == "complete":
                self.complete()
        for left in waiting:
            self.scheduler.submit(left)
        self.finish()

    def finish(self) -> None:
        """Send and complete until nothing is left to do."""
        while self.scheduler.has_work:
            while self.send():
                pass
            self.complete()

    @property
    def rows(self) -> list[SentRow]:
        """All rows in the order in which they were sent."""
        return [row for microbatch in self.sent for row in microbatch]

    def rows_of(self, sequence: Sequence) -> list[SentRow]:
        """The rows of one sequence, in order."""
        return [row for row in self.rows if row.row.sequence is sequence]

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences in the order of their first rows."""
        return list({id(row.row.sequence): row.row.sequence for row in self.rows}.values())
