"""Estimate of a stage's speed from its steps. Knows no stages and no clock: the caller passes loads and times.

A step's time is modelled as fixed time + bytes / bandwidth + operations / speed. The three terms are fitted by least
squares, none of them negative. Errors are relative to the step's time, so that short and long steps count equally.
Older steps lose weight. Where the steps do not determine all terms (the steps of a lone sequence are all alike), the
expected speed decides.
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mlx_k2.scheduling.cost_model import StageSizes, StageSpeed, StepLoad, bytes_read, operations

_FADE = 0.98
"""Factor on a step's weight after each later step: about the last 50 steps count."""
_PRIOR_WEIGHT = 5e-5
"""Weight of the expected speed relative to all steps: enough to decide what the steps leave open."""
_STEPS_PER_FIT = 8
_MIN_FACTOR = 1e-9  # least factor on the expected time of a term: a speed is finite


class SpeedEstimator:
    """Estimator of one stage's ``speed``, which is ``expected`` until the first fit."""

    def __init__(self, sizes: StageSizes, expected: StageSpeed) -> None:
        self._sizes = sizes
        self._expected = expected
        self._products, self._targets = np.zeros((3, 3)), np.zeros(3)  # normal equations: products @ factors = targets
        self._num_steps = 0
        self.speed = expected

    def observe(self, load: StepLoad, busy_s: float) -> bool:
        """Add one step, which took ``busy_s`` seconds; return True if the speed was fitted again."""
        assert busy_s > 0, "a step took no time"
        features = self._expected_s(load) / busy_s
        self._targets = self._targets * _FADE + features
        self._products = self._products * _FADE + np.outer(features, features)
        self._num_steps += 1
        is_fit_due = self._num_steps % _STEPS_PER_FIT == 0
        if is_fit_due:
            self.speed = self._fit()
        return is_fit_due

    def _expected_s(self, load: StepLoad) -> NDArray[np.float64]:
        """Return the expected seconds of a step's three terms: fixed time, reading, computing."""
        expected = self._expected
        reading_s = bytes_read(self._sizes, load) / expected.bytes_per_s
        return np.array([expected.fixed_s, reading_s, operations(self._sizes, load) / expected.operations_per_s])

    def _fit(self) -> StageSpeed:
        """Return the speed with the best three non-negative factors on the expected seconds of the terms.

        The best non-negative factors solve the least squares over some of the terms, so all choices of terms are tried.
        """
        prior = _PRIOR_WEIGHT * np.trace(self._products)
        products, targets = self._products + prior * np.eye(3), self._targets + prior
        fits = [_solve_for(terms, products, targets) for size in (1, 2, 3) for terms in combinations(range(3), size)]
        allowed = [factors for factors in fits if factors.min() >= 0]
        # The key is the squared error, without a part that no factor changes.
        best = min(allowed, key=lambda factors: factors @ products @ factors - 2 * factors @ targets)
        fixed, reading, computing = best.tolist()
        expected = self._expected
        return StageSpeed(
            expected.fixed_s * fixed,
            expected.bytes_per_s / max(reading, _MIN_FACTOR),
            expected.operations_per_s / max(computing, _MIN_FACTOR),
        )


def _solve_for(
    terms: tuple[int, ...], products: NDArray[np.float64], targets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return three factors: the least-squares solution for ``terms``, and 0 for the other terms."""
    factors, index = np.zeros(3), list(terms)
    factors[index] = np.linalg.solve(products[np.ix_(index, index)], targets[index])
    return factors
