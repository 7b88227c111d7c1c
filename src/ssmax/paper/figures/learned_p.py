"""Figure 2: the factor that a model learns for each n."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure as Drawing

from ssmax.paper.claims import Claim, interval_words, verdict
from ssmax.paper.figure import Figure
from ssmax.paper.figures.parts import COLOURS
from ssmax.paper.measured import FORM_NAMES, forms
from ssmax.plots.drawing import panels, title, tokens
from ssmax.plots.select import Spread, by, pick
from ssmax.plots.statistics import Paired
from ssmax.runs.rows import Row


def _draw(rows: Sequence[Row], train_length: int) -> Drawing:
    learned = pick(rows, "learned_p")
    shown = forms(learned)
    figure, axes = panels(1, len(shown), 6 * len(shown), 3.6)
    found = []
    for axis, form in zip(axes[0], shown, strict=True):
        curves = by(learned_p(rows, form, train_length), "n")
        keys = list(curves)
        spreads = [Spread(tuple(curves[n])) for n in keys]
        mean = np.array([s.mean for s in spreads])
        axis.plot(keys, mean, ".", ms=3, color="k", label=f"learned p_n ({len(spreads[0].values)} seeds, mean)")
        low, high = ([end(s.values) for s in spreads] for end in (min, max))
        axis.fill_between(keys, low, high, color="k", alpha=0.12, lw=0)
        fits = law_fits(keys, mean)
        for name, colour in (("log", COLOURS["b"]), ("linear", COLOURS["d"]), ("constant", COLOURS["a"])):
            fit = fits[name]
            axis.plot(keys, fit.curve, color=colour, label=f"{fit.formula}: R² {fit.r2:.3f}")
        axis.set(title=FORM_NAMES[form], ylabel="p")
        tokens(axis, [2**k for k in range(1, 40) if 2**k <= max(keys)], "visible keys n")
        axis.legend()
        found.append(
            f"{FORM_NAMES[form]}: {fits['log'].formula}, R² {fits['log'].r2:.3f}; a line {fits['linear'].r2:.3f}"
        )
    title(figure, "The factor that a model learns for each n. " + "; ".join(found))
    return figure


@dataclass(frozen=True)
class Fit:
    """A least-squares fit.

    Attributes:
        formula: with the fitted numbers.
        curve: its values at the points.
        r2: R²; nan if the fitted values are constant.
    """

    formula: str
    curve: np.ndarray
    r2: float


def law_fits(n: Sequence[int], p: np.ndarray) -> dict[str, Fit]:
    """Fit p_n by a1 log n + a2 (the paper's Figure 2), a1 n + a2 and a2."""
    keys = np.asarray(n, dtype=float)
    shapes = {
        "log": (np.log(keys), "{:.3f} log n + {:.3f}"),
        "linear": (keys, "{:.4f} n + {:.3f}"),
        "constant": (None, "{:.3f}"),
    }
    fits = {}
    for name, (x, formula) in shapes.items():
        columns = [np.ones_like(keys)] if x is None else [x, np.ones_like(keys)]
        design = np.stack(columns, 1)
        solution = np.linalg.lstsq(design, p, rcond=None)[0]
        curve = design @ solution
        scatter = float(((p - p.mean()) ** 2).sum())
        r2 = 1 - float(((p - curve) ** 2).sum()) / scatter if scatter else float("nan")
        r2 = 0.0 if x is None and scatter else r2  # exactly 0; rounding would give -0.000
        fits[name] = Fit(formula.format(*solution), curve, r2)
    return fits


def learned_p(rows: Sequence[Row], form: str, train_length: int) -> list[Row]:
    """Return the rows of p_n without the first and the last n, which get no gradient (one key; no next token)."""
    return [row for row in pick(rows, "learned_p", form=form) if 1 < row.at["n"] < train_length]


def _logarithmic(rows, form, train_length):
    fits = {}
    for seed in by(pick(rows, "learned_p", form=form), "seed"):
        curve = by([row for row in learned_p(rows, form, train_length) if row.seed == seed], "n")
        fits[seed] = law_fits(list(curve), np.array([values[0] for values in curve.values()]))
    log, line = (Spread(tuple(fit[name].r2 for fit in fits.values())) for name in ("log", "linear"))
    paired = Paired(tuple(a - max(b, 0.0) for a, b in zip(log.values, line.values, strict=True)))
    return Claim(
        2,
        f"A factor learned freely for each n is logarithmic in n, rather than linear or constant ({FORM_NAMES[form]})",
        "p_n = a1 log n + a2 fits the learned values",
        f"R² of a1 log n + a2: {log:.3f}; of a line {line:.3f}; of a constant 0; {interval_words(paired)}",
        verdict(paired),
        "law",
        form,
    )


def _judge(rows, train_length):
    return [_logarithmic(rows, form, train_length) for form in forms(pick(rows, "learned_p"))]


FIGURE = Figure(
    name=2,
    metric="learned_p",
    caption=(
        "Figure 2. One factor p_n learned for each number of visible keys, shared by all layers and heads, in "
        "softmax((s p_n + b) z), with least-squares fits; the first and the last n get no gradient and are "
        "left out."
    ),
    draw=_draw,
    judge=_judge,
)
