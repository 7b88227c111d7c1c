"""A figure of the paper as one object: what it needs, how it is drawn, and what it claims."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ssmax.paper.claims import Claim
from ssmax.paper.registered import Registered
from ssmax.runs.rows import Row

__all__ = ["Figure"]


@dataclass(frozen=True)
class Figure:
    """One figure. A file in paper/figures/ that has one as FIGURE is a part of every report.

    Attributes:
        name: the paper's number, or a word.
        metric: the metric without which it cannot be drawn.
        caption: in the report.
        draw: (rows, training length) -> a figure of matplotlib.
        claims: what was registered before the run, judged seed by seed.
        judge: (rows, training length) -> claims that are judged in another way.
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
