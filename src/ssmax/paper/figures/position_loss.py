"""Figure 5: loss by position."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Drawing

from ssmax.paper.figure import Figure
from ssmax.paper.figures.parts import band_of_seeds, listed, mark_training
from ssmax.paper.measured import FORM_NAMES, forms, variants
from ssmax.plots.drawing import legend, panels, title, tokens
from ssmax.plots.select import by, pick
from ssmax.runs.rows import Row


def _draw(rows: Sequence[Row], train_length: int) -> Drawing:
    measured = pick(rows, "loss_by_position")
    shown, factors = forms(measured), sorted({row.at["theta_factor"] for row in measured})
    longest = max(row.at["position"] for row in measured)
    figure, axes = panels(len(shown), len(factors), 4.8 * len(factors), 3.1 * len(shown), sharex=True)
    ends = []
    for row, form in enumerate(shown):
        models = variants(pick(measured, "loss_by_position", form=form))
        for column, factor in enumerate(factors):
            axis = axes[row, column]
            for variant in models:
                losses = pick(measured, "loss_by_position", variant, form=form, theta_factor=factor)
                band_of_seeds(axis, by(losses, "position"), variant)
            mark_training(axis, train_length)
            axis.set(title=f"{FORM_NAMES[form]}, RoPE theta × {factor}", ylabel="loss (nats per token)")
            tokens(axis, [2**k for k in range(3, 40) if 2**k <= longest], "position in the text (tokens)")
            legend(axis)
        at_end = pick(measured, "loss_by_position", form=form, theta_factor=factors[-1], position=longest)
        ends.append(
            f"{FORM_NAMES[form]}: "
            + listed({v: np.mean([r.value for r in at_end if r.variant == v]) for v in models}, ".2f")
        )
    title(figure, f"Loss around position {longest:,}, theta × {factors[-1]}. " + "; ".join(ends))
    return figure


FIGURE = Figure(
    name=5,
    metric="loss_by_position",
    caption=(
        "Figure 5. Loss at each position of held-out texts, far past the training length; mean and range over seeds."
    ),
    draw=_draw,
)
