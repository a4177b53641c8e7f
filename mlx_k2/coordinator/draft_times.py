"""Times of decode steps with a draft head, from the reports of the stages. Knows no deployment and no clock."""

import statistics
from dataclasses import dataclass

from mlx_k2.deployment.listener import StageReport


@dataclass(frozen=True)
class DraftTimes:
    """Median seconds of a lone sequence's steps. The fields are named as in docs/drafts.md.

    ``stages_s``: computing of one token on each stage; ``head_s``: the head; ``right_s`` and ``wrong_s``: from one
    token to the next, if it was a draft and if it was not.
    """

    stages_s: tuple[float, ...]
    head_s: float
    right_s: float
    wrong_s: float

    @property
    def hop_s(self) -> float:
        """Time between two stages, or from the last one through the coordinator to the first."""
        return max(0.0, self.wrong_s - sum(self.stages_s)) / len(self.stages_s)

    @property
    def cycle_s(self) -> float:
        """The expected time of a right draft, max(s1 + d, s0 + c)."""
        return max(*(seconds + self.hop_s for seconds in self.stages_s[:-1]), self.stages_s[-1] + self.head_s)


class DraftTimer:
    """Collector of the reports of steps that carry one generated token."""

    def __init__(self, num_stages: int) -> None:
        self._busy_s: list[list[float]] = [[] for _ in range(num_stages)]
        self._between_s: dict[bool, list[float]] = {True: [], False: []}
        self._sampled_at: float | None = None

    def add(self, report: StageReport) -> None:
        """Add a report, in the order of arrival."""
        (first, *others) = report.microbatch.rows
        if others or first.row.is_prompt or not first.row.needs_logits:
            self._sampled_at = None
            return
        if report.done.is_skipped:
            return
        self._busy_s[report.rank].append(report.done.busy_s)
        if report.rank == len(self._busy_s) - 1:
            if self._sampled_at is not None:
                self._between_s[first.row.is_draft].append(report.received_at - self._sampled_at)
            self._sampled_at = report.received_at

    def times(self, head_s: float) -> DraftTimes | None:
        """Return the medians; None without both right and wrong drafts on all stages."""
        if not (all(self._busy_s) and all(self._between_s.values())) or len(self._busy_s) == 1:
            return None
        stages_s = tuple(statistics.median(busy_s) for busy_s in self._busy_s)
        right_s, wrong_s = (statistics.median(self._between_s[is_draft]) for is_draft in (True, False))
        return DraftTimes(stages_s, head_s, right_s, wrong_s)
