"""Times of decode steps with a draft head, from the reports of the stages. Knows no deployment and no clock."""

import statistics
from dataclasses import dataclass

from mlx_k2.deployment.listener import StageReport


@dataclass(frozen=True)
class DraftTimes:
    """Median seconds of a lone sequence's steps."""

    stages_s: tuple[float, ...]
    """Computing one token, on each stage."""
    head_s: float
    """The draft head after one token."""
    right_s: float
    """From one sampled token to the next, if the next one was computed as a right draft."""
    wrong_s: float
    """From one sampled token to the next without a right draft."""

    @property
    def hop_s(self) -> float:
        """Mean seconds between two stages, or from the last one through the coordinator to the first; at least 0."""
        return max(0.0, self.wrong_s - sum(self.stages_s)) / len(self.stages_s)

    @property
    def cycle_s(self) -> float:
        """The predicted ``right_s``: the longest time of a stage with its hop, or of the last stage with the head."""
        return max(*(seconds + self.hop_s for seconds in self.stages_s[:-1]), self.stages_s[-1] + self.head_s)


class DraftTimer:
    """Collector of the reports of steps that carry one generated token."""

    def __init__(self, num_stages: int) -> None:
        self._busy_s: list[list[float]] = [[] for _ in range(num_stages)]  # computing times, by rank
        self._between_s: dict[bool, list[float]] = {True: [], False: []}
        """Times between two sampled tokens, by whether the second was computed as a draft."""
        self._sampled_at: float | None = None

    def add(self, report: StageReport) -> None:
        """Add a report, in the order of arrival."""
        row = report.microbatch.rows[0].row
        if len(report.microbatch.rows) > 1 or row.is_prompt or not row.needs_logits:
            self._sampled_at = None  # the time until the next token includes another step
            return
        if report.done.is_skipped:
            return
        self._busy_s[report.rank].append(report.done.busy_s)
        if report.rank == len(self._busy_s) - 1:
            if self._sampled_at is not None:
                self._between_s[row.is_draft].append(report.received_at - self._sampled_at)
            self._sampled_at = report.received_at

    def times(self, head_s: float) -> DraftTimes | None:
        """Return the medians and ``head_s``, the draft head's seconds for a token.

        Return None if there is only one stage, no right draft, or no token without a right draft.
        """
        right_s, wrong_s = self._between_s[True], self._between_s[False]
        if len(self._busy_s) == 1 or not (all(self._busy_s) and right_s and wrong_s):
            return None
        stages_s = tuple(statistics.median(busy_s) for busy_s in self._busy_s)
        return DraftTimes(stages_s, head_s, statistics.median(right_s), statistics.median(wrong_s))
