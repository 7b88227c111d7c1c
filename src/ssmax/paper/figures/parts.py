"""Shared by the paper's figures: a colour for each model, bands over seeds, a mark at the training length."""

from typing import Any

from matplotlib.axes import Axes

from ssmax.paper.measured import NAMES
from ssmax.paper.models import VARIANTS
from ssmax.plots.drawing import band
from ssmax.plots.select import Spread

COLOURS = {variant.letter: variant.colour for variant in VARIANTS.values()}


def listed(values: dict[str, Any], spec: str) -> str:
    """Return models and their values as text, the lowest first."""
    return ", ".join(f"{NAMES[v]} {value:{spec}}" for v, value in sorted(values.items(), key=lambda item: item[1]))


def band_of_seeds(axis: Axes, curve: dict, variant: str, **style: Any) -> None:
    """Draw the mean over seeds as a line, and the range from the lowest to the highest seed as a band."""
    x = list(curve)
    spreads = [Spread(tuple(values)) for values in curve.values()]
    seeds = len(spreads[0].values)
    label = f"{NAMES[variant]} ({seeds} seed{'s' if seeds > 1 else ''})"
    ends = [min(s.values) for s in spreads], [max(s.values) for s in spreads]
    band(axis, x, [s.mean for s in spreads], ends, COLOURS[variant], label, **style)


def mark_training(axis: Axes, train_length: int) -> None:
    """Draw a line at the training length."""
    axis.axvline(train_length, color="0.4", lw=0.9, ls="--")
    axis.annotate(
        "training length",
        (train_length, 0.02),
        (3, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=7,
        color="0.4",
    )
