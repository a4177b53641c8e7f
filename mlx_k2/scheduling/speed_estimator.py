"""Learns a stage's speed from its steps. Knows neither stages nor time: it is told what was computed and how long.

Least squares over fixed + bytes / bandwidth + operations / speed, none of them negative, each step weighted by its own
length so that short and long ones count alike. Older steps fade. Where steps do not tell the three apart (a lone
sequence's are all alike), what was expected decides.
"""

from itertools import combinations

from mlx_k2.scheduling.cost_model import StageSizes, StageSpeed, StepLoad, bytes_read, operations

_FADE = 0.98
"""What a step still counts after the next one: about fifty count."""
_TRUST = 1e-4
"""What the expectation counts, beside all steps: enough to decide what they leave open."""
_STEPS_A_FIT = 8
_LONGEST_STEP_S = 1e9


class SpeedEstimator:
    """One stage's constants: ``expected`` at first, then more and more what its steps show."""

    def __init__(self, sizes: StageSizes, expected: StageSpeed) -> None:
        self._sizes = sizes
        self._expected = expected
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._num_seen = 0
        self.speed = expected

    def observe(self, load: StepLoad, busy_s: float) -> bool:
        """Take in one step; whether the constants were fitted anew."""
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
        """The three parts of a step as they were expected, in seconds."""
        expected = self._expected
        return (
            expected.fixed_s,
            bytes_read(self._sizes, load) / expected.bytes_per_s,
            operations(self._sizes, load) / expected.operations_per_s,
        )

    def _fit(self) -> StageSpeed:
        """How many times longer than expected each part takes: the best three factors that are not negative."""
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
    """Squared error of ``factors``, less a constant."""
    squares = sum(factors[i] * factors[j] * products[i][j] for i in range(3) for j in range(3))
    return squares - 2 * sum(factor * target for factor, target in zip(factors, targets, strict=True))


def _solve_some(products: list[list[float]], targets: list[float], kept: tuple[int, ...]) -> list[float] | None:
    """Least squares over the factors in ``kept`` alone, the others 0; None where they cannot be told apart."""
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
