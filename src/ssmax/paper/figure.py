"""A figure of the paper as one object: the metric it needs, its caption, how it is drawn, and its claims."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ssmax.paper.claims import Claim
from ssmax.paper.registered import Registered
from ssmax.runs.rows import Row


@dataclass(frozen=True)
class Figure:
    """One figure. Every report shows the FIGURE of each file in paper/figures/ if it has rows of its metric.

    Attributes:
        name: the paper's number, or a word.
        metric: the metric that it needs.
        caption: its caption in the report.
        draw: (rows, training length) -> a figure of matplotlib.
        claims: claims in addition to those that ssmax.paper.registered holds for it.
        judge: (rows, training length) -> further claims, which are judged in another way.
    """

    name: int | str
    metric: str
    caption: str
    draw: Callable[[Sequence[Row], int], Any]
    claims: tuple[Registered, ...] = ()
    judge: Callable[[Sequence[Row], int], list[Claim]] = lambda rows, train_length: []

    @property
    def file_name(self) -> str:
        """Name of its files, without an ending."""
        return f"figure{self.name}" if isinstance(self.name, int) else self.name
