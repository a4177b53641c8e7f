"""Stages in one process that execute plans on token ids instead of arrays, to test the engine without arithmetic.

A sampled token is a function of the seed and of all tokens in the cache before it, as a real model's is. A plan that
leaves out a position, or relies on a wrong one, therefore changes the answer.
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

STOP_ID = 9
NUM_TOKENS = 10
"""Sampled ids are below this number."""


class TokenStages(StageGroup):
    """A group whose stages execute a plan when ``execute`` is called, on the caller's thread.

    ``on_plan`` is called with each plan that is sent. The last stage skips wrong drafts, and has a draft head, whose
    tokens are right 7 times out of 10.
    """

    def __init__(self, num_stages: int, on_plan: Callable[[Step], None] = lambda _: None) -> None:
        super().__init__([StageLocation()] * num_stages, lease_s=20.0, log=lambda _: None)
        self._on_plan = on_plan
        self._changed = threading.Condition()
        self._posted: deque[StageEvent] = deque()
        self._is_received = False
        self._plans: list[deque[Step]] = [deque() for _ in range(num_stages)]
        self._num_done = [0] * num_stages
        self._caches: list[dict[int, list[int]]] = [{} for _ in range(num_stages)]
        self._has_failed = False
        self._sampled: dict[int, tuple[int, int]] = {}

    def execute(self, rank: int) -> bool:
        """Execute the next plan on one stage; return False if there is none, or the stage before has not done it."""
        with self._changed:
            is_ready = bool(self._plans[rank]) and (rank == 0 or self._num_done[rank - 1] > self._num_done[rank])
            if self._has_failed or not is_ready:
                return False
            step = self._plans[rank].popleft()
        is_last = rank == self.size - 1
        is_skipped = is_last and any(row.is_draft and not self._is_right(row) for row in step.rows)
        if is_skipped:
            self._finish(rank, StepDone(step.number, 0.0, is_skipped=True))
            return True
        tokens = tuple(
            SampledToken(token_id) for row in step.rows if (token_id := self._run(self._caches[rank], row)) is not None
        )
        self._finish(rank, StepDone(step.number, 0.001, tokens=tokens if is_last else ()))
        if is_last:
            sampling_rows = (row for row in step.rows if row.needs_logits)
            self._sampled |= {
                row.slot: (row.end, token.token_id) for row, token in zip(sampling_rows, tokens, strict=True)
            }
            self._draft(rank, step)
        return True

    def _finish(self, rank: int, done: StepDone) -> None:
        with self._changed:
            self._num_done[rank] += 1
        self._post(StageMessage(rank, done))

    def _is_right(self, row: Row) -> bool:
        return self._sampled.get(row.slot) == (row.position, row.token_ids[0])

    def _draft(self, rank: int, step: Step) -> None:
        """Send the drafts that the step's row requests. Those in plans that have arrived are kept."""
        row = step.rows[0]
        if row.draft is None or row.sampling is None:
            return
        token_ids = [*self._caches[rank][row.slot], self._sampled[row.slot][1]]
        num_known = len(token_ids)
        planned = [later.rows[0].token_ids[0] for later in self._plans[rank] if later.rows[0].is_draft]
        kept = planned[1:] if planned[:1] == token_ids[-1:] else []
        for index in range(row.draft.num_tokens):
            following = drafted_after(token_ids, row.sampling)
            token_ids.append(kept[index] if index < len(kept) else following)
        self._post(StageMessage(rank, Drafted(step.number, tuple(token_ids[num_known:]), 0.001)))

    def next_step(self, rank: int) -> Step | None:
        """Return the plan that ``execute`` would execute next on one stage; None if there is none."""
        with self._changed:
            return self._plans[rank][0] if self._plans[rank] else None

    def fail(self, rank: int) -> None:
        """End one stage, as if its process had been killed. The others execute nothing more."""
        self._has_failed = True
        self._post(StageEnded(rank, self.host(rank), True, "it was killed", signal=9))

    def wait_until_waiting(self, timeout_s: float) -> bool:
        """Wait until the engine waits for an event and there is none; return whether it does."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_received and not self._posted, timeout_s)

    # ---- as a StageGroup

    @property
    def has_event(self) -> bool:
        """True if ``receive`` would return an event at once."""
        return bool(self._posted)

    def wake(self) -> None:
        """End the present or next ``receive`` with Woken."""
        self._post(Woken())

    def receive(self, timeout_s: float) -> StageEvent | None:
        """Return the next event; None if there is none within ``timeout_s``."""
        with self._changed:
            self._is_received = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._posted, timeout_s)
            self._is_received = False
            return self._posted.popleft() if self._posted else None

    def send(self, rank: int, message: ToStage) -> None:
        """Queue a plan for one stage."""
        if isinstance(message, Step):
            with self._changed:
                self._plans[rank].append(message)
            if rank == self.size - 1:
                self._on_plan(message)

    def send_all(self, message: ToStage) -> None:
        """Queue a plan for every stage."""
        for rank in range(self.size):
            self.send(rank, message)

    def host(self, rank: int) -> str:
        """Return a made-up name."""
        return f"host {rank}"

    def silence_s(self, rank: int) -> float:  # noqa: ARG002 - the group's argument
        """Return 0: there is no guard."""
        return 0.0

    def has_started(self, rank: int) -> bool:  # noqa: ARG002 - the group's argument
        """Return True."""
        return True

    def status(self, rank: int) -> StageStatus:  # noqa: ARG002 - the group's argument
        """Return a stage that waits for plans."""
        return StageStatus(PhaseUpdate(Phase.IDLE), 0.0)

    def stop(self, notify: Callable[[str], None]) -> None:
        """Do nothing: there is no process."""

    def _post(self, event: StageEvent) -> None:
        with self._changed:
            self._posted.append(event)
            self._changed.notify_all()

    def sample(self, token_ids: Sequence[int], sampling: Sampling) -> int:
        """Return the token sampled after ``token_ids``. A subclass may force tokens, as a function of these alone."""
        return sampled_after(token_ids, sampling)

    def _run(self, caches: dict[int, list[int]], row: Row) -> int | None:
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
    """Return the tokens that the stages sample for a request without a token policy, alone or with others."""
    token_ids = list(request.prompt_ids)
    while len(token_ids) < len(request.prompt_ids) + request.max_tokens:
        token_ids.append(sampled_after(token_ids, request.sampling))
        if token_ids[-1] in request.stop_ids:
            break
    return token_ids[len(request.prompt_ids) :]
