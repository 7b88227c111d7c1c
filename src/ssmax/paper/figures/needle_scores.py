"""Figure 7: each head's attention on the needle."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Drawing

from ssmax.paper.figure import Figure
from ssmax.paper.figures.parts import band_of_seeds, listed
from ssmax.paper.measured import FORM_NAMES, forms, variants
from ssmax.plots.drawing import panels, title
from ssmax.plots.select import by, pick
from ssmax.runs.rows import Row


def _draw(rows: Sequence[Row], train_length: int) -> Drawing:
    scores = pick(rows, "needle_score")
    shown = forms(scores)
    figure, axes = panels(1, len(shown), 4.8 * len(shown), 3.4, sharey=True)
    best = {form: {} for form in shown}
    for axis, form in zip(axes[0], shown, strict=True):
        for variant in variants(pick(scores, "needle_score", form=form)):
            per_seed = by(pick(rows, "needle_score", variant, form=form), "seed")
            ranked = np.array([sorted(scores, reverse=True) for scores in per_seed.values()])
            band_of_seeds(
                axis, {rank + 1: ranked[:, rank].tolist() for rank in range(ranked.shape[1])}, variant, marker="o"
            )
            best[form][variant] = ranked[:, 0].mean()
        axis.set(
            title=FORM_NAMES[form],
            xlabel="head, best first",
            ylabel="needle score (share of attention)",
            ylim=(0, None),
        )
        axis.legend()
    length = scores[0].at["length"]
    what = "; ".join(f"{FORM_NAMES[form]}: {listed(best[form], '.2f')}" for form in shown)
    title(figure, f"Attention of the best head on the needle in {length:,} tokens. {what}")
    return figure


FIGURE = Figure(
    name=7,
    metric="needle_score",
    caption=(
        "Figure 7. Needle score of each head: its attention on the needle's tokens from the query that predicts "
        "the first token of the answer, mean over trials, sorted; mean and range over seeds."
    ),
    draw=_draw,
)
