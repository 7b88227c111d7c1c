"""The paper's figures from rows: each title says what this run found, and each model keeps one colour."""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssmax.paper.claims import law_fits, learned_p
from ssmax.paper.measured import raised
from ssmax.plots.drawing import STYLE, band, heat_map, legend, panels, title, tokens
from ssmax.plots.select import FORM_NAMES, NAMES, Spread, by, forms, pick, variants
from ssmax.runs.rows import Row

__all__ = ["draw", "drawable", "scales"]

COLOURS = {"a": "#d55e00", "b": "#0072b2", "c": "#56b4e9", "d": "#009e73", "e": "#e69f00", "f": "#cc79a7"}


def draw(name: int | str, rows: Sequence[Row], train_length: int) -> Figure:
    """Draw one of the paper's figures by its number, or "counting"."""
    with matplotlib.rc_context(STYLE):
        return FIGURES[name](rows, train_length)


def drawable(rows: Sequence[Row]) -> list[int | str]:
    """Return the figures that the rows can show."""
    metrics = {row.metric for row in rows}
    return [name for name, metric in NEEDS.items() if metric in metrics]


def scales(rows: Sequence[Row], kind: str) -> bytes:
    """Draw s and whatever else is learned of each layer and head of a model as an image, kind "png" or "svg"."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    with matplotlib.rc_context(STYLE):
        heads = 1 + max(row.at["head"] for row in rows)
        layers = sorted({row.at["layer"] for row in rows})
        width, height = max(4.5, 0.32 * heads + 2), max(2.6, 0.2 * len(layers) + 1.2)
        figure, axes = panels(1, len(metrics), width * len(metrics), height)
        for axis, metric in zip(axes[0], metrics, strict=True):
            grid = np.full((len(layers), heads), np.nan)
            for row in pick(rows, metric):
                grid[layers.index(row.at["layer"]), row.at["head"]] = row.value
            image = axis.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
            figure.colorbar(image, ax=axis)
            every = math.ceil(len(layers) / 16)
            axis.set_yticks(range(0, len(layers), every), layers[::every])
            axis.set(title=f"{metric}: mean {np.nanmean(grid):.4f}", xlabel="head", ylabel="layer")
            axis.grid(False)
        name = rows[0].variant.replace("$", r"\$")  # a folder's name is no formula
        title(figure, f"{name}: {' and '.join(metrics)} of each head")
        content = io.BytesIO()
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def _max_weight(rows, train_length):
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


def _focus(rows, train_length):
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


def _learned_p(rows, train_length):
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


def _training_loss(rows, train_length):
    losses = pick(rows, "train_loss", stage="pretrain")
    shown = forms(losses)
    figure, axes = panels(1, len(shown), 5.2 * len(shown), 3.6)
    ends = []
    for axis, form in zip(axes[0], shown, strict=True):
        last = {}
        for variant in variants(pick(losses, "train_loss", form=form)):
            curve = by(pick(losses, "train_loss", variant, form=form), "step")
            _band(axis, curve, variant)
            last[variant] = np.mean(list(curve.values())[-1])
        axis.set(title=FORM_NAMES[form], xlabel="training step", ylabel="training loss (nats per token)")
        axis.set_ylim(top=_early(losses, form))
        ends.append(f"{FORM_NAMES[form]}: " + _listed(last, ".3f"))
        legend(axis)
    title(figure, "Training loss at the end. " + "; ".join(ends))
    return figure


def _listed(values: dict[str, Any], spec: str) -> str:
    """Models and their values in words, the lowest first."""
    return ", ".join(f"{NAMES[v]} {value:{spec}}" for v, value in sorted(values.items(), key=lambda item: item[1]))


def _early(rows, form):
    """The loss after a sixth of the training: what lies above it hides all differences."""
    curve = by([row for row in pick(rows, "train_loss", form=form) if row.variant in NAMES], "step")
    values = [float(np.max(v)) for v in curve.values()]
    return values[min(len(values) - 1, len(values) // 6)]


def _position_loss(rows, train_length):
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
                _band(axis, by(losses, "position"), variant)
            _mark_training(axis, train_length)
            axis.set(title=f"{FORM_NAMES[form]}, RoPE theta × {factor}", ylabel="loss (nats per token)")
            tokens(axis, [2**k for k in range(3, 40) if 2**k <= longest], "position in the text (tokens)")
            legend(axis)
        at_end = pick(measured, "loss_by_position", form=form, theta_factor=factors[-1], position=longest)
        ends.append(
            f"{FORM_NAMES[form]}: "
            + _listed({v: np.mean([r.value for r in at_end if r.variant == v]) for v in models}, ".2f")
        )
    title(figure, f"Loss around position {longest:,}, theta × {factors[-1]}. " + "; ".join(ends))
    return figure


def _retrieval(rows, train_length):
    rows = pick(rows, "retrieval_accuracy", theta_factor=raised(rows, "retrieval_accuracy"))
    cells = rows
    shown = forms(cells)
    asked = {form: variants(pick(cells, "retrieval_accuracy", form=form)) for form in shown}
    most = max(map(len, asked.values()))
    lengths, depths = (sorted({row.at[name] for row in cells}) for name in ("length", "depth"))
    figure, axes = panels(len(shown), most + 1, 3.6 * (most + 1), 3.0 * len(shown))
    for row, form in enumerate(shown):
        for column, variant in enumerate(asked[form]):
            axis = axes[row, column]
            mean = by(pick(rows, "retrieval_accuracy", variant, form=form), "depth", "length")
            grid = np.array([[np.mean(mean[depth, length]) for length in lengths] for depth in depths])
            heat_map(axis, grid, lengths, depths, f"{NAMES[variant]}, {FORM_NAMES[form]}")
        for axis in axes[row, len(asked[form]) : -1]:
            axis.axis("off")
        axis = axes[row, -1]
        for variant in asked[form]:
            per_seed = by(pick(rows, "retrieval_accuracy", variant, form=form), "length", "seed")
            _band(axis, {n: [float(np.mean(v)) for (m, _), v in per_seed.items() if m == n] for n in lengths}, variant)
        _mark_training(axis, train_length)
        axis.set(title=f"mean over depths, {FORM_NAMES[form]}", ylabel="accuracy", ylim=(-0.02, 1.02))
        tokens(axis, lengths, "context (tokens)")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 0.08))
    beyond = {
        v: np.mean([r.value for r in pick(rows, "retrieval_accuracy", v) if r.at["length"] > train_length])
        for v in variants(cells)
    }
    what = ", ".join(f"{NAMES[v]} {x:.0%}" for v, x in beyond.items())
    title(figure, f"Needles found past the training length, theta × {cells[0].at['theta_factor']}: {what}")
    return figure


def _needle_scores(rows, train_length):
    scores = pick(rows, "needle_score")
    shown = forms(scores)
    figure, axes = panels(1, len(shown), 4.8 * len(shown), 3.4, sharey=True)
    best = {form: {} for form in shown}
    for axis, form in zip(axes[0], shown, strict=True):
        for variant in variants(pick(scores, "needle_score", form=form)):
            per_seed = by(pick(rows, "needle_score", variant, form=form), "seed")
            ranked = np.array([sorted(scores, reverse=True) for scores in per_seed.values()])
            _band(axis, {rank + 1: ranked[:, rank].tolist() for rank in range(ranked.shape[1])}, variant, marker="o")
            best[form][variant] = ranked[:, 0].mean()
        axis.set(
            title=FORM_NAMES[form],
            xlabel="head, best first",
            ylabel="needle score (share of attention)",
            ylim=(0, None),
        )
        axis.legend()
    length = scores[0].at["length"]
    what = "; ".join(f"{FORM_NAMES[form]}: {_listed(best[form], '.2f')}" for form in shown)
    title(figure, f"Attention of the best head on the needle in {length:,} tokens. {what}")
    return figure


def _top_scores(rows, train_length):
    trials = pick(rows, "top_needle_score")
    shown = forms(trials)
    figure, axes = panels(1, len(shown), 5.2 * len(shown), 3.8, sharey=True)
    jitter = np.random.default_rng(0)
    for axis, form in zip(axes[0], shown, strict=True):
        labels = []
        for variant in variants(pick(trials, "top_needle_score", form=form)):
            for ok, word in ((True, "right"), (False, "wrong")):
                values = [trial.value for trial in pick(rows, "top_needle_score", variant, form=form, correct=ok)]
                place = len(labels) + jitter.uniform(-0.32, 0.32, len(values))
                axis.scatter(place, values, s=7, alpha=0.5, lw=0, color=COLOURS[variant] if ok else "0.5")
                if values:
                    axis.hlines(np.mean(values), len(labels) - 0.4, len(labels) + 0.4, color="k", lw=1.5)
                labels.append(f"{NAMES[variant]}\n{word}: {len(values)}")
        axis.set(
            title=f"{FORM_NAMES[form]}, all seeds; bar: mean", ylabel="top needle score of a trial", ylim=(-0.02, 1.04)
        )
        axis.set_xticks(range(len(labels)), labels)
    share = {ok: [r.value for r in pick(rows, "top_needle_score", correct=ok)] for ok in (True, False)}
    means = {ok: f"{np.mean(values):.2f}" if values else "–" for ok, values in share.items()}
    title(
        figure,
        f"Top needle score of a trial: {means[True]} where the answer was right, {means[False]} where it was wrong",
    )
    return figure


def _counting(rows, train_length):
    answers = pick(rows, "counting_accuracy")
    shown = forms(answers)
    figure, axes = panels(1, len(shown), 5.2 * len(shown), 3.6, sharey=True)
    far = []
    for axis, form in zip(axes[0], shown, strict=True):
        past, curve = {}, {}
        for variant in variants(pick(answers, "counting_accuracy", form=form)):
            curve = by(pick(answers, "counting_accuracy", variant, form=form), "length")
            _band(axis, curve, variant)
            past[variant] = np.mean([np.mean(values) for n, values in curve.items() if n <= train_length])
        axis.axhline(0.1, color="0.6", lw=0.8, ls=":")
        _mark_training(axis, train_length)
        axis.set(title=f"{FORM_NAMES[form]}; dotted: chance", ylabel="share of right counts", ylim=(0, 1.02))
        tokens(axis, list(curve), "context (tokens)")
        axis.legend()
        far.append(f"{FORM_NAMES[form]}: " + _listed(past, ".2f"))
    title(figure, "Counting 0 to 9 words, right within the training length. " + "; ".join(far))
    return figure


def _band(axis: Axes, curve: dict, variant: str, **style: Any) -> None:
    """Mean over seeds as a line, lowest to highest seed as a band."""
    x = list(curve)
    spreads = [Spread(tuple(values)) for values in curve.values()]
    seeds = len(spreads[0].values)
    label = f"{NAMES[variant]} ({seeds} seed{'s' if seeds > 1 else ''})"
    ends = [min(s.values) for s in spreads], [max(s.values) for s in spreads]
    band(axis, x, [s.mean for s in spreads], ends, COLOURS[variant], label, **style)


def _mark_training(axis: Axes, train_length: int) -> None:
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


# The metric without which a figure cannot be drawn.
NEEDS = {
    1: "max_weight",
    2: "learned_p",
    3: "focus_weight",
    4: "train_loss",
    5: "loss_by_position",
    6: "retrieval_accuracy",
    7: "needle_score",
    8: "top_needle_score",
    "counting": "counting_accuracy",
}
FIGURES: dict[int | str, Any] = {
    1: _max_weight,
    2: _learned_p,
    3: _focus,
    4: _training_loss,
    5: _position_loss,
    6: _retrieval,
    7: _needle_scores,
    8: _top_scores,
    "counting": _counting,
}
