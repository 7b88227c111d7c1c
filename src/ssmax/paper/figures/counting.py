"""The counter-test: counting, which needs flat attention."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Drawing

from ssmax.paper.figure import Figure
from ssmax.paper.figures.parts import band_of_seeds, listed, mark_training
from ssmax.paper.measured import FORM_NAMES, forms, variants
from ssmax.plots.drawing import panels, title, tokens
from ssmax.plots.select import by, pick
from ssmax.runs.rows import Row


def _draw(rows: Sequence[Row], train_length: int) -> Drawing:
    answers = pick(rows, "counting_accuracy")
    shown = forms(answers)
    figure, axes = panels(1, len(shown), 5.2 * len(shown), 3.6, sharey=True)
    far = []
    for axis, form in zip(axes[0], shown, strict=True):
        past, curve = {}, {}
        for variant in variants(pick(answers, "counting_accuracy", form=form)):
            curve = by(pick(answers, "counting_accuracy", variant, form=form), "length")
            band_of_seeds(axis, curve, variant)
            past[variant] = np.mean([np.mean(values) for n, values in curve.items() if n <= train_length])
        axis.axhline(0.1, color="0.6", lw=0.8, ls=":")
        mark_training(axis, train_length)
        axis.set(title=f"{FORM_NAMES[form]}; dotted: chance", ylabel="share of right counts", ylim=(0, 1.02))
        tokens(axis, list(curve), "context (tokens)")
        axis.legend()
        far.append(f"{FORM_NAMES[form]}: " + listed(past, ".2f"))
    title(figure, "Counting 0 to 9 words, right within the training length. " + "; ".join(far))
    return figure


FIGURE = Figure(
    name="counting",
    metric="counting_accuracy",
    caption=(
        "Counter-test. Share of right answers to the question how often a word occurs in the text, after fine-tuning on "
        "contexts up to the training length; mean and range over seeds."
    ),
    draw=_draw,
)
