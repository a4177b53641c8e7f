"""Estimate of a stage's speed from its steps. Knows no stages and no clock: the caller passes loads and times.

Least squares over fixed + bytes / bandwidth + operations / speed, with no negative term. Errors are relative to the
step's time, so that short and long steps count equally. Older steps lose weight. Where the steps do not determine all
three terms (the steps of a lone sequence are all alike), the expected speed decides.
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mlx_k2.scheduling.cost_model import StageSizes, StageSpeed, StepLoad, bytes_read, operations

_FADE = 0.98
"""Factor on a step's weight after each later step: about the last 50 steps count."""
_TRUST = 5e-5
"""Weight of the expected speed relative to all steps: enough to decide what the steps leave open."""
_STEPS_A_FIT = 8
_LONGEST_STEP_S = 1e9


class SpeedEstimator:
    """Speed constants of one stage: ``expected`` at first, then increasingly those fitted to its steps."""

    def __init__(self, sizes: StageSizes, expected: StageSpeed) -> None:
        self._sizes = sizes
        self._expected = expected
        self._products = np.zeros((3, 3))
        self._targets = np.zeros(3)
        self._num_seen = 0
        self.speed = expected

    def observe(self, load: StepLoad, busy_s: float) -> bool:
        """Add one step; return True if the constants were fitted again."""
        assert busy_s > 0, "a step took no time"
        features = self._features(load) / busy_s
        self._targets = self._targets * _FADE + features
        self._products = self._products * _FADE + np.outer(features, features)
        self._num_seen += 1
        is_time = self._num_seen % _STEPS_A_FIT == 0
        if is_time:
            self.speed = self._fit()
        return is_time

    def _features(self, load: StepLoad) -> NDArray[np.float64]:
        """Return the expected seconds of a step's three parts: fixed, reading and computing."""
        expected = self._expected
        reading_s = bytes_read(self._sizes, load) / expected.bytes_per_s
        return np.array([expected.fixed_s, reading_s, operations(self._sizes, load) / expected.operations_per_s])

    def _fit(self) -> StageSpeed:
        """Return the speed with the best three non-negative factors on the expected seconds of the parts."""
        pull = _TRUST * np.trace(self._products)
        products, targets = self._products + pull * np.eye(3), self._targets + pull
        fits = [_solve_some(products, targets, kept) for size in (1, 2, 3) for kept in combinations(range(3), size)]
        allowed = [factors for factors in fits if factors.min() >= 0]
        best = min(allowed, key=lambda factors: factors @ products @ factors - 2 * factors @ targets)  # squared error
        fixed, reading, computing = best.tolist()
        expected = self._expected
        return StageSpeed(
            expected.fixed_s * fixed,
            expected.bytes_per_s / max(reading, 1 / _LONGEST_STEP_S),
            expected.operations_per_s / max(computing, 1 / _LONGEST_STEP_S),
        )


def _solve_some(
    products: NDArray[np.float64], targets: NDArray[np.float64], kept: tuple[int, ...]
) -> NDArray[np.float64]:
    """Solve least squares over the factors in ``kept``, the others 0."""
    factors, index = np.zeros(3), list(kept)
    factors[index] = np.linalg.solve(products[np.ix_(index, index)], targets[index])
    return factors
