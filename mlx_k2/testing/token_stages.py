"""Stages in one process that execute plans on token ids instead of arrays, to test the engine without arithmetic.

As in a real model, a sampled token is a function of the seed and of all tokens before it in the cache. So the answer
changes if a plan omits a position or relies on a wrong one.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Sequence

from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.stage_events import StageEnded, StageEvent, StageMessage, Woken
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.protocol.guard_messages import Phase, PhaseUpdate, StageStatus
from mlx_k2.protocol.messages import Drafted, Step, StepDone, ToStage
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.scheduling.request import Request

NUM_TOKENS = 10
"""Size of the vocabulary: sampled ids are 0 to 9."""
STOP_ID = 9
"""A sampled id that tests use as stop token."""


class TokenStages(StageGroup):
    """A group whose stages execute a plan when ``execute`` is called, on the caller's thread.

    ``on_plan`` is called with each plan that is sent. The last stage skips wrong drafts. It has a draft head, which
    drafts the right token 7 times out of 10.
    """

    def __init__(self, num_stages: int, on_plan: Callable[[Step], None] = lambda _: None) -> None:
        super().__init__([StageLocation()] * num_stages, lease_s=20.0, log=lambda _: None)
        self._on_plan = on_plan
        self._changed = threading.Condition()
        self._pending_events: deque[StageEvent] = deque()
        self._is_receiving = False
        self._plans: list[deque[Step]] = [deque() for _ in range(num_stages)]
        self._num_executed = [0] * num_stages
        self._caches: list[dict[int, list[int]]] = [{} for _ in range(num_stages)]  # by rank: token ids by slot
        self._has_failed = False
        self._sampled: dict[int, tuple[int, int]] = {}  # by slot: position and id of the last sampled token

    def execute(self, rank: int) -> bool:
        """Execute the next plan on one stage. Return False if it has no plan or no input, or if a stage has failed."""
        with self._changed:
            has_input = rank == 0 or self._num_executed[rank - 1] > self._num_executed[rank]
            is_ready = bool(self._plans[rank]) and has_input
            if self._has_failed or not is_ready:
                return False
            step = self._plans[rank].popleft()
        is_last = rank == self.size - 1
        is_skipped = is_last and any(row.is_draft and not self._is_right(row) for row in step.rows)
        if is_skipped:
            self._finish(rank, StepDone(step.number, busy_s=0.0, is_skipped=True))
            return True
        token_ids = []
        for row in step.rows:
            token_id = self._run(self._caches[rank], row)
            if token_id is not None and is_last:
                token_ids.append(token_id)
                self._sampled[row.slot] = (row.end, token_id)
        self._finish(rank, StepDone(step.number, busy_s=0.001, tokens=tuple(map(SampledToken, token_ids))))
        if is_last:
            self._draft(rank, step)
        return True

    def _finish(self, rank: int, done: StepDone) -> None:
        with self._changed:
            self._num_executed[rank] += 1
        self._post(StageMessage(rank, done))

    def _is_right(self, row: Row) -> bool:
        """Return whether the draft of a row is the token that was sampled at its position."""
        return self._sampled.get(row.slot) == (row.position, row.token_ids[0])

    def _draft(self, rank: int, step: Step) -> None:
        """Send the drafts that the step's row requests.

        Drafts that are in plans already are sent unchanged, provided that the first of them is the sampled token.
        """
        row = step.rows[0]
        if row.draft is None or row.sampling is None:
            return
        token_ids = [*self._caches[rank][row.slot], self._sampled[row.slot][1]]
        num_sampled = len(token_ids)
        planned = [later.rows[0].token_ids[0] for later in self._plans[rank].copy() if later.rows[0].is_draft]
        old_drafts = planned[1:] if planned[:1] == token_ids[-1:] else []
        for index in range(row.draft.num_tokens):
            new_draft = drafted_after(token_ids, row.sampling)
            token_ids.append(old_drafts[index] if index < len(old_drafts) else new_draft)
        self._post(StageMessage(rank, Drafted(step.number, tuple(token_ids[num_sampled:]), busy_s=0.001)))

    def next_step(self, rank: int) -> Step | None:
        """Return the plan that ``execute`` would execute next on one stage; None if there is none."""
        with self._changed:
            return self._plans[rank][0] if self._plans[rank] else None

    def fail(self, rank: int) -> None:
        """End one stage, as if its process had been killed. The others execute nothing more."""
        self._has_failed = True
        self._post(StageEnded(rank, self.host(rank), has_started=True, reason="it was killed", signal=9))

    def wait_until_waiting(self, timeout_s: float) -> bool:
        """Wait until the engine waits in ``receive`` and there is no event. Return False after ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_receiving and not self._pending_events, timeout_s)

    # ---- as a StageGroup

    @property
    def has_event(self) -> bool:
        """True if ``receive`` would return an event at once."""
        return bool(self._pending_events)

    def wake(self) -> None:
        """End the present or next ``receive`` with Woken."""
        self._post(Woken())

    def receive(self, timeout_s: float) -> StageEvent | None:
        """Return the next event; None if there is none within ``timeout_s``."""
        with self._changed:
            self._is_receiving = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._pending_events, timeout_s)
            self._is_receiving = False
            return self._pending_events.popleft() if self._pending_events else None

    def send(self, rank: int, message: ToStage) -> None:
        """Queue a plan for one stage. Other messages are dropped."""
        if isinstance(message, Step):
            with self._changed:
                self._plans[rank].append(message)
            if rank == self.size - 1:  # all stages get the plan: report it once
                self._on_plan(message)

    def send_all(self, message: ToStage) -> None:
        """Queue a plan for every stage. Other messages are dropped."""
        for rank in range(self.size):
            self.send(rank, message)

    def host(self, rank: int) -> str:
        """Return the name of a stage's host."""
        return f"host {rank}"

    def silence_s(self, rank: int) -> float:  # noqa: ARG002 - the group's argument
        """Return 0: there is no guard."""
        return 0.0

    def has_started(self, rank: int) -> bool:  # noqa: ARG002 - the group's argument
        """Return True."""
        return True

    def status(self, rank: int) -> StageStatus:  # noqa: ARG002 - the group's argument
        """Return the status of a stage that waits for plans."""
        return StageStatus(PhaseUpdate(Phase.IDLE), 0.0)

    def stop(self, notify: Callable[[str], None]) -> None:
        """Do nothing: there is no process."""

    def _post(self, event: StageEvent) -> None:
        with self._changed:
            self._pending_events.append(event)
            self._changed.notify_all()

    def sample(self, token_ids: Sequence[int], sampling: Sampling) -> int:
        """Return the token sampled after ``token_ids``. A subclass may force tokens, as a function of these alone."""
        return sampled_after(token_ids, sampling)

    def _run(self, caches: dict[int, list[int]], row: Row) -> int | None:
        """Write the row's tokens to the cache of its slot. Return the sampled token; None if the row samples none."""
        cache = caches.setdefault(row.slot, [])
        if row.copy_from is not None:
            cache[: row.position] = caches[row.copy_from][: row.position]
        assert len(cache) >= row.position, "a row attends to positions that were never computed"
        cache[row.position :] = row.token_ids
        return None if row.sampling is None else self.sample(cache, row.sampling)


def sampled_after(token_ids: Sequence[int], sampling: Sampling) -> int:
    """Return the token that the stages sample after ``token_ids``."""
    data = b"".join(token_id.to_bytes(4, "little") for token_id in (sampling.seed & 0xFFFFFFFF, *token_ids))
    return hashlib.blake2b(data, digest_size=8).digest()[0] % NUM_TOKENS


def drafted_after(token_ids: Sequence[int], sampling: Sampling) -> int:
    """Return the draft head's token after ``token_ids``: 7 times out of 10 the one that the stages sample."""
    is_right = sampled_after([*token_ids, 0], sampling) < 7
    return (sampled_after(token_ids, sampling) + (not is_right)) % NUM_TOKENS


def answer_alone(request: Request) -> list[int]:
    """Return the tokens that the stages sample for a request without a token policy."""
    token_ids = list(request.prompt_ids)
    while len(token_ids) < len(request.prompt_ids) + request.max_tokens:
        token_ids.append(sampled_after(token_ids, request.sampling))
        if token_ids[-1] in request.stop_ids:
            break
    return token_ids[len(request.prompt_ids) :]
