"""A figure of s and b for each layer and head of a model."""

import functools
import math
from collections.abc import Sequence

import numpy as np

from ssmax.plots.drawing import panels, rendered, title
from ssmax.plots.select import pick
from ssmax.runs.rows import Row


def scales(rows: Sequence[Row], kind: str) -> bytes:
    """Draw s and the other learned values of each layer and head of a model as an image, kind "png" or "svg"."""
    return rendered(functools.partial(_draw, rows), kind)[0]


def _draw(rows):
    metrics = list(dict.fromkeys(row.metric for row in rows))
    heads = 1 + max(row.at["head"] for row in rows)
    layers = list(dict.fromkeys(row.at["layer"] for row in rows))
    width, height = max(4.5, 0.32 * heads + 2), max(2.6, 0.2 * len(layers) + 1.2)
    figure, axes = panels(1, len(metrics), width * len(metrics), height)
    for axis, metric in zip(axes[0], metrics, strict=True):
        grid = np.full((len(layers), heads), np.nan)
        for row in pick(rows, metric):
            grid[layers.index(row.at["layer"]), row.at["head"]] = row.value
        image = axis.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
        figure.colorbar(image, ax=axis)
        every = math.ceil(len(layers) / 16)
        axis.set_yticks(range(0, len(layers), every), layers[::every])
        axis.set(title=f"{metric}: mean {np.nanmean(grid):.4f}", xlabel="head", ylabel="layer")
        axis.grid(False)
    name = rows[0].variant.replace("$", r"\$")  # matplotlib would read $...$ in a folder's name as a formula
    title(figure, f"{name}: {' and '.join(metrics)} of each head")
    return figure
