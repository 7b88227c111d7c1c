"""Figure 6: needles found."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Drawing

from ssmax.paper.figure import Figure
from ssmax.paper.figures.parts import band_of_seeds, mark_training
from ssmax.paper.measured import FORM_NAMES, NAMES, forms, largest_factor, stretch, variants
from ssmax.plots.drawing import heat_map, panels, title, tokens
from ssmax.plots.select import by, pick
from ssmax.runs.rows import Row


def _draw(rows: Sequence[Row], train_length: int) -> Drawing:
    rows = pick(rows, "retrieval_accuracy", theta_factor=largest_factor(rows, "retrieval_accuracy"))
    cells = rows
    shown = forms(cells)
    asked = {form: variants(pick(cells, "retrieval_accuracy", form=form)) for form in shown}
    lengths, depths = (sorted({row.at[name] for row in cells}) for name in ("length", "depth"))
    most = max(map(len, asked.values())) + 1  # and one panel for the means
    columns = min(most, 4)
    lines = -(-most // columns)
    figure, axes = panels(lines * len(shown), columns, 3.6 * columns, 3.0 * lines * len(shown))
    for line, form in enumerate(shown):
        places = axes[lines * line : lines * (line + 1)].flat
        for axis, variant in zip(places, asked[form], strict=False):
            mean = by(pick(rows, "retrieval_accuracy", variant, form=form), "depth", "length")
            grid = np.array([[np.mean(mean[depth, length]) for length in lengths] for depth in depths])
            heat_map(axis, grid, lengths, depths, f"{NAMES[variant]}, {FORM_NAMES[form]}")
        axis, *unused = places[len(asked[form]) :]
        for other in unused:
            other.axis("off")
        for variant in asked[form]:
            per_seed = by(pick(rows, "retrieval_accuracy", variant, form=form), "length", "seed")
            band_of_seeds(
                axis, {n: [float(np.mean(v)) for (m, _), v in per_seed.items() if m == n] for n in lengths}, variant
            )
        mark_training(axis, train_length)
        axis.set(title=f"mean over depths, {FORM_NAMES[form]}", ylabel="accuracy", ylim=(-0.02, 1.02))
        tokens(axis, lengths, "context (tokens)")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 0.08), fontsize=7)
    beyond = {
        v: np.mean([r.value for r in pick(rows, "retrieval_accuracy", v) if r.at["length"] > train_length])
        for v in variants(cells)
    }
    what = ", ".join(f"{NAMES[v]} {x:.0%}" for v, x in beyond.items())
    title(figure, f"Needles found past the training length, {stretch(cells[0])}: {what}")
    return figure


FIGURE = Figure(
    name=6,
    metric="retrieval_accuracy",
    caption=(
        "Figure 6. Share of needles found, by context size and depth, after fine-tuning on contexts up to the training "
        "length."
    ),
    draw=_draw,
)
