"""Laws of n: the values that each head's scale learned, and the registered claims about the recipe laws."""

from collections.abc import Sequence

from matplotlib.figure import Figure as Drawing

from ssmax.paper.figure import Figure
from ssmax.paper.measured import NAMES, variants
from ssmax.paper.models import VARIANTS
from ssmax.plots.drawing import panels, title
from ssmax.plots.select import pick
from ssmax.runs.rows import Row


def _draw(rows: Sequence[Row], train_length: int) -> Drawing:
    learned = pick(rows, "learned_scale")
    names = list(dict.fromkeys(row.at["name"] for row in learned))
    figure, axes = panels(1, len(names), 3.6 * len(names), 3.4)
    for axis, name in zip(axes[0], names, strict=True):
        shown = variants(pick(learned, "learned_scale", name=name))
        for place, variant in enumerate(shown):
            values = [row.value for row in pick(learned, "learned_scale", variant, name=name)]
            axis.scatter([place] * len(values), values, s=14, alpha=0.5, lw=0, color=VARIANTS[variant].colour)
        axis.set_xticks(range(len(shown)), [NAMES[variant].replace(" ", "\n", 1) for variant in shown])
        axis.set(title=name, xlim=(-0.6, len(shown) - 0.4))
    title(figure, "What each head's scale learned")
    return figure


FIGURE = Figure(
    name="laws",
    metric="learned_scale",
    caption="Laws of n. Values that the scales learned in pretraining; each point is one head of one layer and seed.",
    draw=_draw,
)
