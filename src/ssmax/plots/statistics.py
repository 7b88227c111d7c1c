"""Paired differences over seeds: interval, effect size, and the seeds that would decide an open claim. No scipy, no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssmax.plots.select import Spread

LEVEL = 0.95
MOST_SEEDS = 1000
DRAWS = 2000  # of a bootstrap


def t_cdf(t: float, freedom: int) -> float:
    """Return P(T <= t) of Student's t with a whole number of degrees of freedom.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4, in theta = atan(t /
    sqrt(freedom)).
    """
    theta = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    odd = freedom % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(freedom // 2):
        total += term
        term *= square * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return 0.5 + inside / 2


def t_quantile(probability: float, freedom: int) -> float:
    """Return the t with P(T <= t) = probability, for a probability above 1/2; found by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Paired(Spread):
    """Differences between two models, one value for each seed; each pair shares initial weights and data.

    Attributes:
        stored: differences of other seeds of the same recipe. They add to the deviation, not to
            the mean.
    """

    stored: tuple[float, ...] = ()

    @property
    def seeds(self) -> int:
        """Number of pairs."""
        return len(self.values)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the deviation."""
        return max(self.seeds - 1, 0) + self._more

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds, pooled with that of the stored seeds; nan where neither has two."""
        groups = [np.asarray(group) for group in (self.values, self.stored) if len(group) > 1]
        squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
        return math.sqrt(squares / self.freedom) if self.freedom else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean, mean ± t deviation / sqrt(seeds); infinite where the deviation is not known."""
        if not (self.freedom and self.values):
            return -math.inf, math.inf
        half = t_quantile((1 + LEVEL) / 2, self.freedom) * self.deviation / math.sqrt(self.seeds)
        return self.mean - half, self.mean + half

    @property
    def effect(self) -> float:
        """The mean in standard deviations (Cohen's d for pairs); nan if the deviation is 0 or nan."""
        return self.mean / self.deviation if self.deviation else float("nan")

    @property
    def seeds_needed(self) -> int | None:
        """Number of seeds with which the interval would exclude zero, at the same mean and deviation; None above 1,000."""
        if not self.deviation > 0 or self.mean == 0:
            return None
        for seeds in range(2, MOST_SEEDS + 1):
            quantile = t_quantile((1 + LEVEL) / 2, seeds - 1 + self._more)
            if quantile * self.deviation / math.sqrt(seeds) < abs(self.mean):
                return seeds
        return None

    @property
    def _more(self):
        return max(len(self.stored) - 1, 0)


def bootstrap(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over resampled texts. The random draws are always the same."""
    values = np.asarray(differences, dtype=float)
    chosen = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(values[chosen].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
