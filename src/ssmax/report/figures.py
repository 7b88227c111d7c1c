"""The paper's figures from rows: each title says what this run found, and each model keeps one colour."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssmax.report.select import FORM_NAMES, NAMES, Spread, by, forms, pick, variants
from ssmax.results import Row

__all__ = ["FIGURES", "draw", "scales"]

COLOURS = {"a": "#d55e00", "b": "#0072b2"}
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "ssmax",
}


def draw(number: int, rows: Sequence[Row], train_length: int) -> Figure:
    """Draw one of the paper's figures."""
    with matplotlib.rc_context(STYLE):
        return FIGURES[number](rows, train_length)


def scales(rows: Sequence[Row], kind: str) -> bytes:
    """Draw s (and b) of each layer and head of a model as an image, kind "png" or "svg"."""
    metrics = sorted({row.metric for row in rows}, reverse=True)
    with matplotlib.rc_context(STYLE):
        heads = 1 + max(row.at["head"] for row in rows)
        layers = sorted({row.at["layer"] for row in rows})
        width, height = max(4.5, 0.32 * heads + 2), max(2.6, 0.2 * len(layers) + 1.2)
        figure, axes = _panels(1, len(metrics), width * len(metrics), height)
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
        _title(figure, f"{rows[0].variant}: multiplier s log n{' + b' if 'b' in metrics else ''} of each head")
        content = io.BytesIO()
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def _max_weight(rows, train_length):
    figure, axes = _panels(1, 1, 6, 3.4)
    ends = {}
    for variant in ("a", "b"):
        curve = by(pick(rows, "max_weight", variant), "n")
        axes[0, 0].plot(
            list(curve), [v[0] for v in curve.values()], "o-", ms=3, color=COLOURS[variant], label=NAMES[variant]
        )
        ends[variant] = list(curve.values())[-1][0]
    _title(
        figure,
        f"With {max(curve):,} keys the largest weight is {ends['a']:.4f} under Softmax, {ends['b']:.4f} under SSMax",
    )
    axes[0, 0].set(xscale="log", xlabel="number of keys n", ylabel="weight of the largest logit", ylim=(-0.02, 1.05))
    axes[0, 0].legend(title="one logit +3, all others −2; s = 0.43")
    return figure


def _focus(rows, train_length):
    figure, axes = _panels(1, 3, 10, 3.3, sharey=True)
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
    _title(figure, "Under SSMax the lead that a key needs does not grow with the number of keys")
    return figure


def _training_loss(rows, train_length):
    shown = forms(rows)
    figure, axes = _panels(1, len(shown), 5.2 * len(shown), 3.6)
    ends = []
    for axis, form in zip(axes[0], shown, strict=True):
        for variant in variants(rows):
            losses = pick(rows, "train_loss", variant, form=form, stage="pretrain")
            _band(axis, by(losses, "step"), variant)
        axis.set(title=FORM_NAMES[form], xlabel="training step", ylabel="training loss (nats per token)")
        axis.set_ylim(top=_early(rows, form))
        last = {
            v: np.mean(list(by(pick(rows, "train_loss", v, form=form, stage="pretrain"), "step").values())[-1])
            for v in variants(rows)
        }
        ends.append(f"{FORM_NAMES[form]}: " + ", ".join(f"{NAMES[v]} {x:.3f}" for v, x in last.items()))
        axis.legend()
    _title(figure, "Training loss at the end. " + "; ".join(ends))
    return figure


def _early(rows, form):
    """The loss after a sixth of the training: what lies above it hides all differences."""
    losses = by(pick(rows, "train_loss", form=form, stage="pretrain"), "step")
    values = [float(np.max(v)) for v in losses.values()]
    return values[min(len(values) - 1, len(values) // 6)]


def _position_loss(rows, train_length):
    shown, factors = forms(rows), sorted({row.at["theta_factor"] for row in pick(rows, "loss_by_position")})
    figure, axes = _panels(len(shown), len(factors), 4.8 * len(factors), 3.1 * len(shown), sharex=True)
    for row, form in enumerate(shown):
        for column, factor in enumerate(factors):
            axis = axes[row, column]
            for variant in variants(rows):
                losses = pick(rows, "loss_by_position", variant, form=form, theta_factor=factor)
                _band(axis, by(losses, "position"), variant)
            _mark_training(axis, train_length)
            axis.set(title=f"{FORM_NAMES[form]}, RoPE theta × {factor}", ylabel="loss (nats per token)")
            ends = [int(2**k) for k in range(3, 40) if 2**k <= max(row.at["position"] for row in losses)]
            _tokens(axis, ends, "position in the text (tokens)")
            axis.legend(loc="upper left")
    longest, top = max(row.at["position"] for row in pick(rows, "loss_by_position")), factors[-1]
    ends = [
        f"{FORM_NAMES[form]}: "
        + ", ".join(
            f"{NAMES[v]} {np.mean([r.value for r in pick(rows, 'loss_by_position', v, form=form, theta_factor=top, position=longest)]):.2f}"
            for v in variants(rows)
        )
        for form in shown
    ]
    _title(figure, f"Loss around position {longest:,}, theta × {top}. " + "; ".join(ends))
    return figure


def _retrieval(rows, train_length):
    shown, models = forms(rows), variants(rows)
    cells = pick(rows, "retrieval_accuracy")
    lengths, depths = (sorted({row.at[name] for row in cells}) for name in ("length", "depth"))
    figure, axes = _panels(len(shown), len(models) + 1, 3.6 * (len(models) + 1), 3.0 * len(shown))
    for row, form in enumerate(shown):
        for column, variant in enumerate(models):
            axis = axes[row, column]
            mean = by(pick(rows, "retrieval_accuracy", variant, form=form), "depth", "length")
            grid = np.array([[np.mean(mean[depth, length]) for length in lengths] for depth in depths])
            axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for (y, x), value in np.ndenumerate(grid):
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k", fontsize=7)
            axis.set(
                title=f"{NAMES[variant]}, {FORM_NAMES[form]}", xlabel="context (tokens)", ylabel="depth of the needle"
            )
            axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
            axis.grid(False)
        axis = axes[row, -1]
        for variant in models:
            per_seed = by(pick(rows, "retrieval_accuracy", variant, form=form), "length", "seed")
            _band(axis, {n: [float(np.mean(v)) for (m, _), v in per_seed.items() if m == n] for n in lengths}, variant)
        _mark_training(axis, train_length)
        axis.set(title=f"mean over depths, {FORM_NAMES[form]}", ylabel="accuracy", ylim=(-0.02, 1.02))
        _tokens(axis, lengths, "context (tokens)")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 0.08))
    beyond = {
        v: np.mean([r.value for r in pick(rows, "retrieval_accuracy", v) if r.at["length"] > train_length])
        for v in models
    }
    what = ", ".join(f"{NAMES[v]} {x:.0%}" for v, x in beyond.items())
    _title(figure, f"Needles found past the training length, theta × {cells[0].at['theta_factor']}: {what}")
    return figure


def _needle_scores(rows, train_length):
    shown = forms(rows)
    figure, axes = _panels(1, len(shown), 4.8 * len(shown), 3.4, sharey=True)
    best = {}
    for axis, form in zip(axes[0], shown, strict=True):
        for variant in variants(rows):
            per_seed = by(pick(rows, "needle_score", variant, form=form), "seed")
            ranked = np.array([sorted(scores, reverse=True) for scores in per_seed.values()])
            _band(axis, {rank + 1: ranked[:, rank].tolist() for rank in range(ranked.shape[1])}, variant, marker="o")
            best[form, variant] = ranked[:, 0].mean()
        axis.set(
            title=FORM_NAMES[form],
            xlabel="head, best first",
            ylabel="needle score (share of attention)",
            ylim=(0, None),
        )
        axis.legend()
    length = pick(rows, "needle_score")[0].at["length"]
    what = "; ".join(
        f"{FORM_NAMES[f]}: " + ", ".join(f"{NAMES[v]} {best[f, v]:.2f}" for v in variants(rows)) for f in shown
    )
    _title(figure, f"Attention of the best head on the needle in {length:,} tokens. {what}")
    return figure


def _top_scores(rows, train_length):
    shown, models = forms(rows), variants(rows)
    figure, axes = _panels(1, len(shown), 5.2 * len(shown), 3.8, sharey=True)
    jitter = np.random.default_rng(0)
    for axis, form in zip(axes[0], shown, strict=True):
        labels = []
        for variant in models:
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
    _title(
        figure,
        f"Top needle score of a trial: {means[True]} where the answer was right, {means[False]} where it was wrong",
    )
    return figure


def _title(figure: Figure, text: str) -> None:
    figure.suptitle("\n".join(textwrap.wrap(text, int(figure.get_figwidth() * 11))), fontsize=11)


def _tokens(axis: Axes, ticks: Sequence[int], label: str) -> None:
    """A logarithmic axis of token counts, in plain numbers."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(label)


def _panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(width, 6), height + 0.4))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _band(axis: Axes, curve: dict, variant: str, **style: Any) -> None:
    """Mean over seeds as a line, lowest to highest seed as a band."""
    x = list(curve)
    spreads = [Spread(tuple(values)) for values in curve.values()]
    seeds = len(spreads[0].values)
    label = f"{NAMES[variant]} ({seeds} seed{'s' if seeds > 1 else ''})"
    axis.plot(x, [s.mean for s in spreads], color=COLOURS[variant], label=label, ms=3, **style)
    axis.fill_between(
        x, [min(s.values) for s in spreads], [max(s.values) for s in spreads], color=COLOURS[variant], alpha=0.18, lw=0
    )


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


FIGURES = {
    1: _max_weight,
    3: _focus,
    4: _training_loss,
    5: _position_loss,
    6: _retrieval,
    7: _needle_scores,
    8: _top_scores,
}
