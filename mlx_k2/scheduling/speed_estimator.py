"""Estimate of a stage's speed from its steps. Knows no stages and no clock: the caller passes loads and times.

Least squares over fixed + bytes / bandwidth + operations / speed, with no negative term. Errors are relative to the
step's time, so that short and long steps count equally. Older steps lose weight. Where the steps do not determine all
three terms (the steps of a lone sequence are all alike), the expected speed decides.
"""

from itertools import combinations

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
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._num_seen = 0
        self.speed = expected

    def observe(self, load: StepLoad, busy_s: float) -> bool:
        """Add one step; return True if the constants were fitted again."""
        assert busy_s > 0, "a step took no time"
        features = [feature / busy_s for feature in self._features(load)]
        for i in range(3):
            self._targets[i] = self._targets[i] * _FADE + features[i]
            for j in range(3):
                self._products[i][j] = self._products[i][j] * _FADE + features[i] * features[j]
        self._num_seen += 1
        is_time = self._num_seen % _STEPS_A_FIT == 0
        if is_time:
            self.speed = self._fit()
        return is_time

    def _features(self, load: StepLoad) -> tuple[float, float, float]:
        """Return the expected seconds of a step's three parts: fixed, reading and computing."""
        expected = self._expected
        return (
            expected.fixed_s,
            bytes_read(self._sizes, load) / expected.bytes_per_s,
            operations(self._sizes, load) / expected.operations_per_s,
        )

    def _fit(self) -> StageSpeed:
        """Return the speed with the best three non-negative factors on the expected seconds of the parts."""
        products = [row[:] for row in self._products]
        targets = self._targets[:]
        pull = _TRUST * sum(products[i][i] for i in range(3))
        for i in range(3):
            products[i][i] += pull
            targets[i] += pull
        fits = [_solve_some(products, targets, kept) for size in (1, 2, 3) for kept in combinations(range(3), size)]
        allowed = [factors for factors in fits if factors is not None and min(factors) >= 0]
        best = min(allowed, key=lambda factors: _loss(products, targets, factors))
        fixed, reading, computing = best
        expected = self._expected
        return StageSpeed(
            expected.fixed_s * fixed,
            expected.bytes_per_s / max(reading, 1 / _LONGEST_STEP_S),
            expected.operations_per_s / max(computing, 1 / _LONGEST_STEP_S),
        )


def _loss(products: list[list[float]], targets: list[float], factors: list[float]) -> float:
    """Return the squared error of ``factors``, less a constant."""
    squares = sum(factors[i] * factors[j] * products[i][j] for i in range(3) for j in range(3))
    return squares - 2 * sum(factor * target for factor, target in zip(factors, targets, strict=True))


def _solve_some(products: list[list[float]], targets: list[float], kept: tuple[int, ...]) -> list[float] | None:
    """Solve least squares over the factors in ``kept``, the others 0; return None if the system is singular."""
    rows = [[products[i][j] for j in kept] + [targets[i]] for i in kept]
    size = len(kept)
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(rows[row][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        if abs(rows[column][column]) < 1e-18:
            return None
        for row in range(size):
            if row != column:
                scale = rows[row][column] / rows[column][column]
                rows[row] = [left - scale * right for left, right in zip(rows[row], rows[column], strict=True)]
    factors = [0.0] * 3
    for index, i in enumerate(kept):
        factors[i] = rows[index][size] / rows[index][index]
    return factors
