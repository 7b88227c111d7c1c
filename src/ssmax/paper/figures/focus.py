"""Figure 3: the lead that a key needs."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Drawing

from ssmax.paper.claims import HOLDS, HOLDS_NOT, Claim
from ssmax.paper.figure import Figure
from ssmax.paper.figures.parts import COLOURS
from ssmax.paper.measured import NAMES
from ssmax.plots.drawing import panels, title
from ssmax.plots.select import by, pick
from ssmax.runs.rows import Row


def _draw(rows: Sequence[Row], train_length: int) -> Drawing:
    figure, axes = panels(1, 3, 10, 3.3, sharey=True)
    keys = sorted({row.at["n"] for row in pick(rows, "focus_weight")})
    for axis, (variant, s) in zip(axes[0], (("a", None), ("b", 0.43), ("b", 1.0)), strict=True):
        for n in keys:
            curve = by(pick(rows, "focus_weight", variant, n=n, s=s), "z_max")
            shade = 0.3 + 0.7 * keys.index(n) / max(1, len(keys) - 1)
            axis.plot(
                list(curve), [v[0] for v in curve.values()], color=COLOURS[variant], alpha=shade, label=f"n = {n:,}"
            )
        axis.axhline(0.5, color="0.6", lw=0.8, ls=":")
        axis.set(
            title=NAMES[variant] + (f", s = {s:g}" if s else ""),
            xlabel="largest logit z_max (the others lie on 0 to 1)",
        )
        axis.legend(loc="lower right")
    axes[0, 0].set_ylabel("weight of z_max")
    title(figure, "Under SSMax the lead that a key needs does not grow with the number of keys")
    return figure


def crossing(rows: Sequence[Row], variant: str, n: int, s: float | None) -> float:
    """Return the z_max whose weight is 1/2, by linear interpolation."""
    curve = by(pick(rows, "focus_weight", variant, n=n, s=s), "z_max")
    return float(np.interp(0.5, [value[0] for value in curve.values()], [float(z) for z in curve]))


def _judge(rows, train_length):
    few, many = 100, 100_000
    softmax = [crossing(rows, "a", n, None) for n in (few, many)]
    ssmax = [crossing(rows, "b", n, 0.43) for n in (few, many)]
    claim = Claim(
        3,
        "The lead that a key needs to hold half of the attention grows with log n under Softmax, not under SSMax",
        "SSMax focuses at a lead of about 1/s, whatever n is",
        f"from {few} to {many:,} keys z_max for weight 1/2 moves {softmax[0]:.2f} → {softmax[1]:.2f} under Softmax, "
        f"{ssmax[0]:.2f} → {ssmax[1]:.2f} under SSMax (s = 0.43)",
        HOLDS if ssmax[1] - ssmax[0] < 0.1 * (softmax[1] - softmax[0]) else HOLDS_NOT,
    )
    return [claim]


FIGURE = Figure(
    name=3,
    metric="focus_weight",
    caption="Figure 3. The weight of the largest logit against its value, from the formula. Darker: more keys.",
    draw=_draw,
    judge=_judge,
)
