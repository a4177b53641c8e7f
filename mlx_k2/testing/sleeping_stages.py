"""Stages that sleep instead of computing, one thread each, to run the coordinator without the cost of arithmetic."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

from mlx_k2.protocol.messages import Drafted, Step, StepDone, encode_message
from mlx_k2.sampling import SampledToken
from mlx_k2.scheduling.cost_model import StageSizes, StageSpeed
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.stage.draft_plans import DraftPlans

STEP_S = 0.02
TOKEN = 1
"""The id of every sampled token."""
SIZES = replace(StageSizes(**{size.name: 0 for size in fields(StageSizes)}), dense_bytes=1_000_000, tile_rows=1)
SPEED = StageSpeed(fixed_s=0.0, bytes_per_s=SIZES.dense_bytes / STEP_S, operations_per_s=1.0)
"""With SIZES and SPEED the cost model predicts STEP_S for every step."""


@dataclass
class SleepingStages:
    """Stages that only sleep, one thread each. The last one puts encoded messages into ``done``.

    Every sampled token is TOKEN. After a row that requests drafts the last stage sleeps for ``draft_s``. Then it sends
    the drafts: TOKEN for each position where ``is_right(position)``, and another token for the other positions. Drafts
    that are known to be wrong are skipped.
    """

    num_stages: int
    draft_s: float = 0.0
    is_right: Callable[[int], bool] = lambda _: True
    done: "queue.SimpleQueue[bytes]" = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self._inbox: queue.SimpleQueue[Microbatch | None] = queue.SimpleQueue()
        self._plans = DraftPlans()
        before = self._inbox
        for rank in range(self.num_stages):
            after: queue.SimpleQueue[Microbatch | None] = queue.SimpleQueue()
            is_last = rank == self.num_stages - 1
            threading.Thread(target=self._work, args=(before, after, is_last), daemon=True).start()
            before = after

    def send(self, microbatch: Microbatch) -> None:
        """Queue ``microbatch`` for the first stage."""
        self._plans.add(Step(microbatch.number, tuple(planned.row for planned in microbatch.rows)))
        self._inbox.put(microbatch)

    def stop(self) -> None:
        """End all threads."""
        self._inbox.put(None)

    def _work(
        self, before: "queue.SimpleQueue[Microbatch | None]", after: "queue.SimpleQueue[Microbatch | None]", last: bool
    ) -> None:
        while (microbatch := before.get()) is not None:
            if self._is_known_wrong(microbatch, last):
                skipped = encode_message(StepDone(microbatch.number, busy_s=0.0, is_skipped=True))
                self.done.put(skipped) if last else after.put(microbatch)
                continue
            time.sleep(STEP_S)
            if not last:
                after.put(microbatch)
                continue
            tokens = tuple(SampledToken(TOKEN) for planned in microbatch.rows if planned.row.needs_logits)
            self.done.put(encode_message(StepDone(microbatch.number, STEP_S, tokens=tokens)))
            row = microbatch.rows[0].row
            if row.draft is not None:
                time.sleep(self.draft_s)
                first = row.end + 1  # the sampled token is at row.end
                drafts = (TOKEN if self.is_right(first + i) else TOKEN + 1 for i in range(row.draft.num_tokens))
                self.done.put(encode_message(Drafted(microbatch.number, tuple(drafts), self.draft_s)))
        after.put(None)

    def _is_known_wrong(self, microbatch: Microbatch, last: bool) -> bool:
        """Return whether a stage knows that a draft is wrong: always the last one, others if a later plan undoes it."""
        row = microbatch.rows[0].row
        return row.is_draft and row.token_ids[0] != TOKEN and (last or self._plans.is_undone(microbatch.number, row))
