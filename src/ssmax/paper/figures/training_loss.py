"""Figure 4: the training loss."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Drawing

from ssmax.paper.figure import Figure
from ssmax.paper.figures.parts import band_of_seeds, listed
from ssmax.paper.measured import FORM_NAMES, NAMES, forms, variants
from ssmax.plots.drawing import legend, panels, title
from ssmax.plots.select import by, pick
from ssmax.runs.rows import Row


def _draw(rows: Sequence[Row], train_length: int) -> Drawing:
    losses = pick(rows, "train_loss", stage="pretrain")
    shown = forms(losses)
    figure, axes = panels(1, len(shown), 5.2 * len(shown), 3.6)
    ends = []
    for axis, form in zip(axes[0], shown, strict=True):
        last = {}
        for variant in variants(pick(losses, "train_loss", form=form)):
            curve = by(pick(losses, "train_loss", variant, form=form), "step")
            band_of_seeds(axis, curve, variant)
            last[variant] = np.mean(list(curve.values())[-1])
        axis.set(title=FORM_NAMES[form], xlabel="training step", ylabel="training loss (nats per token)")
        axis.set_ylim(top=_early(losses, form))
        ends.append(f"{FORM_NAMES[form]}: " + listed(last, ".3f"))
        legend(axis)
    title(figure, "Training loss at the end. " + "; ".join(ends))
    return figure


def _early(rows, form):
    """Return the loss after a sixth of the training. The axis ends there, since higher losses would hide the differences."""
    curve = by([row for row in pick(rows, "train_loss", form=form) if row.variant in NAMES], "step")
    values = [float(np.max(v)) for v in curve.values()]
    return values[min(len(values) - 1, len(values) // 6)]


FIGURE = Figure(
    name=4,
    metric="train_loss",
    caption=(
        "Figure 4. Training loss; mean and range over seeds. The first sixth of the training lies above the panel."
    ),
    draw=_draw,
)
