"""Figure 1: the largest weight by the number of keys."""

from collections.abc import Sequence

from matplotlib.figure import Figure as Drawing

from ssmax.paper.claims import HOLDS, HOLDS_NOT, Claim
from ssmax.paper.figure import Figure
from ssmax.paper.figures.parts import COLOURS
from ssmax.paper.measured import NAMES
from ssmax.plots.drawing import panels, title
from ssmax.plots.select import by, pick
from ssmax.runs.rows import Row


def _draw(rows: Sequence[Row], train_length: int) -> Drawing:
    figure, axes = panels(1, 1, 6, 3.4)
    ends = {}
    for variant in ("a", "b"):
        curve = by(pick(rows, "max_weight", variant), "n")
        axes[0, 0].plot(
            list(curve), [v[0] for v in curve.values()], "o-", ms=3, color=COLOURS[variant], label=NAMES[variant]
        )
        ends[variant] = list(curve.values())[-1][0]
    title(
        figure,
        f"With {max(curve):,} keys the largest weight is {ends['a']:.4f} under Softmax, {ends['b']:.4f} under SSMax",
    )
    axes[0, 0].set(xscale="log", xlabel="number of keys n", ylabel="weight of the largest logit", ylim=(-0.02, 1.05))
    axes[0, 0].legend(title="one logit +3, all others −2; s = 0.43")
    return figure


def _judge(rows, train_length):
    weights = {variant: by(pick(rows, "max_weight", variant), "n") for variant in "ab"}
    n = max(weights["a"])
    a, b = (weights[variant][n][0] for variant in "ab")
    claim = Claim(
        1,
        "The largest Softmax weight fades as the number of keys grows; SSMax's does not",
        "Softmax → 0, SSMax stays near 1 (s = 0.43)",
        f"at {n:,} keys: Softmax {a:.4f}, SSMax {b:.4f}",
        HOLDS if a < 0.5 < b else HOLDS_NOT,
    )
    return [claim]


FIGURE = Figure(
    name=1,
    metric="max_weight",
    caption="Figure 1. The largest attention weight against the number of keys, from the formula.",
    draw=_draw,
    judge=_judge,
)
