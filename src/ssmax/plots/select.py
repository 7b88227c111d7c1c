"""Selecting rows: filter by coordinates, group by seed, mean and spread."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssmax.runs.rows import Row


def pick(rows: Sequence[Row], metric: str, variant: str | None = None, **at: Any) -> list[Row]:
    """Return the rows of a metric (and a variant, if given) whose coordinates have the values in `at`."""
    return [
        row
        for row in rows
        if row.metric == metric
        and variant in (None, row.variant)
        and all(row.at.get(name) == value for name, value in at.items())
    ]


def by(rows: Sequence[Row], *names: str) -> dict[Any, list[float]]:
    """Group values by coordinates ("seed" and "variant" are coordinates too), in ascending order."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        key = tuple({"seed": row.seed, "variant": row.variant, **row.at}[name] for name in names)
        groups[key if len(names) > 1 else key[0]].append(row.value)
    return dict(sorted(groups.items()))


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; str gives "mean ± deviation"."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """Sample standard deviation, nan for one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else float("nan")

    def __format__(self, spec: str) -> str:
        mean = format(self.mean, spec)
        return mean if len(self.values) < 2 else f"{mean} ± {self.deviation:{spec.lstrip('+')}}"
