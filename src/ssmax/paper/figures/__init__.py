"""The paper's figures, one file each, with caption and claims. To add one, write a file here with a Figure named FIGURE."""

import importlib
import pkgutil
from collections.abc import Sequence
from types import MappingProxyType

from ssmax.paper.claims import Claim, judged
from ssmax.paper.figure import Figure
from ssmax.paper.registered import registered
from ssmax.paper.seeds import Differences
from ssmax.runs.rows import Row


def find_figures() -> dict[int | str, Figure]:
    """Return the figures of all files in this folder by their names, numbers first."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    figures = [module.FIGURE for module in modules if hasattr(module, "FIGURE")]
    return {figure.name: figure for figure in sorted(figures, key=lambda f: (isinstance(f.name, str), f.name))}


FIGURES = find_figures()


def drawable(rows: Sequence[Row]) -> list[int | str]:
    """Return the names of the figures for which there are rows."""
    metrics = {row.metric for row in rows}
    return [name for name, figure in FIGURES.items() if figure.metric in metrics]


def claims(rows: Sequence[Row], train_length: int, stored: Differences = MappingProxyType({})) -> list[Claim]:
    """Return all claims that the rows can judge, in the order of the figures; stored: what other seeds of the recipe gave."""
    found = []
    for name in drawable(rows):
        figure = FIGURES[name]
        asked = (*registered(name), *figure.claims)
        found += [*judged(asked, rows, train_length, stored), *figure.judge(rows, train_length)]
    return found
