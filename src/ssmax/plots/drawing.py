"""Shared by all figures: style, panels, titles, token axes, bands and heat maps."""

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssmax.runs.files import write_atomically

STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "ssmax",
}


def rendered(draw: Callable[[], Figure], *kinds: str) -> list[bytes]:
    """Draw a figure in the style of all figures, and return it as an image of each kind, "png" or "svg"."""
    images = []
    with matplotlib.rc_context(STYLE):  # matplotlib reads some of it when it saves
        figure = draw()
        for kind in kinds:
            content = io.BytesIO()
            figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
            images.append(content.getvalue())
    return images


def save(draw: Callable[[], Figure], folder: Path, name: str) -> bytes:
    """Draw a figure, save it as PNG and SVG, and return the SVG."""
    png, svg = rendered(draw, "png", "svg")
    write_atomically(folder / f"{name}.png", png)
    write_atomically(folder / f"{name}.svg", svg)
    return svg


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure and its (rows, columns) axes."""
    figure = Figure(figsize=(max(width, 6), height + 0.4))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def title(figure: Figure, text: str) -> None:
    """Put a wrapped title over a figure."""
    figure.suptitle("\n".join(textwrap.wrap(text, int(figure.get_figwidth() * 11))), fontsize=11)


def tokens(axis: Axes, ticks: Sequence[int], label: str) -> None:
    """Make a logarithmic axis of token counts, in plain numbers."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(label)


def legend(axis: Axes) -> None:
    """Put a legend above the curves, and make room for it."""
    models = len(axis.get_legend_handles_labels()[1])
    low, high = axis.get_ylim()
    axis.set_ylim(top=high + (high - low) * (0.12 + 0.05 * models))
    axis.legend(loc="upper right", ncols=2, fontsize=7)


def band(
    axis: Axes, x: Sequence, line: Sequence, ends: tuple[Sequence, Sequence], colour: str, label: str, **style: Any
) -> None:
    """Draw a line, and a band around it from the lower to the upper ends."""
    axis.plot(x, line, color=colour, label=label, ms=3, **style)
    axis.fill_between(x, *ends, color=colour, alpha=0.18, lw=0)


def heat_map(axis: Axes, grid: np.ndarray, lengths: Sequence[int], depths: Sequence[float], name: str) -> None:
    """Draw the share of right answers, (depths, lengths), by depth (rows) and context length in tokens (columns)."""
    axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        axis.text(x, y, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k", fontsize=7)
    axis.set(title=name, xlabel="context (tokens)", ylabel="depth of the needle")
    axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    axis.grid(False)
