"""Figures of ssmax evaluate. Each model has its own colour, in the order in which the user gave the models."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from ssmax.plots.drawing import band, heat_map, legend, panels, title, tokens
from ssmax.plots.select import by, pick
from ssmax.runs.rows import Row

# Safe for colour-blind readers (Okabe and Ito). Further models repeat the colours with dashed lines.
PALETTE = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def _look(models: Sequence[str], model: str) -> tuple[str, dict]:
    index = models.index(model)
    return PALETTE[index % len(PALETTE)], {"ls": ("-", "--", ":")[index // len(PALETTE) % 3]}


def _loss(rows, models):
    figure, axes = panels(1, 1, 7, 3.8)
    axis, ends, values = axes[0, 0], [], []
    for model in models:
        losses = pick(rows, "loss_by_position", model)
        if not losses:
            continue
        colour, style = _look(models, model)
        ends_of = [r.at.get("low", r.value) for r in losses], [r.at.get("high", r.value) for r in losses]
        band(axis, [r.at["position"] for r in losses], [r.value for r in losses], ends_of, colour, model, **style)
        ends.append(f"{model} {losses[-1].value:.3f}")
        values += [row.value for row in losses]
    longest = max(row.at["position"] for row in pick(rows, "loss_by_position"))
    tokens(axis, _powers(longest), "position in the text (tokens)")
    # With few documents the bands are wide, so the axis follows the curves.
    axis.set(ylabel="loss (nats per token)", ylim=(min(values) - 0.5, max(values) + 0.5))
    legend(axis)
    title(figure, f"Loss around position {longest:,}: {', '.join(ends)}")
    return figure


def _retrieval(rows, models):
    cells = pick(rows, "retrieval_accuracy")
    tasks = list(dict.fromkeys(row.at["task"] for row in cells))
    figure, axes = panels(len(tasks), len(models) + 1, 3.4 * (len(models) + 1), 2.9 * len(tasks))
    for task, line in zip(tasks, axes, strict=True):
        asked = pick(cells, "retrieval_accuracy", task=task)
        lengths, depths = (sorted({row.at[name] for row in asked}) for name in ("length", "depth"))
        for model, axis in zip(models, line, strict=False):
            values = by(pick(asked, "retrieval_accuracy", model), "depth", "length")
            grid = np.array([[values.get((d, n), [np.nan])[0] for n in lengths] for d in depths])
            heat_map(axis, grid, lengths, depths, f"{model}, {task}")
            colour, style = _look(models, model)
            line[-1].plot(lengths, grid.mean(0), "o", ms=3, color=colour, label=model, **style)
            axis.tick_params(axis="x", labelrotation=30)
        line[-1].set(title=f"mean over depths, {task}", ylabel="whole number right", ylim=(-0.02, 1.02))
        tokens(line[-1], lengths, "context (tokens)")
        line[-1].legend(fontsize=7)
    means = (f"{m} {np.mean([r.value for r in pick(cells, 'retrieval_accuracy', m)]):.0%}" for m in models)
    title(figure, f"Numbers found, mean over all cells: {', '.join(means)}")
    return figure


def _needle_scores(rows, models):
    figure, axes = panels(1, 1, 7, 3.6)
    scores = pick(rows, "needle_score")
    task, best = scores[0].at["task"], []
    for model in models:
        ranked = sorted((row.value for row in pick(scores, "needle_score", model, task=task)), reverse=True)
        if ranked:
            colour, style = _look(models, model)
            axes[0, 0].plot(range(1, len(ranked) + 1), ranked, "o", ms=2, color=colour, label=model, **style)
            best.append(f"{model} {ranked[0]:.2f}")
    axes[0, 0].set(xscale="log", xlabel="head, best first", ylabel="needle score (share of attention)", ylim=(0, None))
    axes[0, 0].legend()
    at = scores[0].at
    title(
        figure,
        f"Attention of the best head on the needle at {at['length']:,} tokens, depth {at['depth']:.0%}: {', '.join(best)}",
    )
    return figure


def _sharpness(rows, models):
    figure, axes = panels(2, 2, 10, 6, sharex=True)
    for line, metric, words in zip(
        axes, ("attention_entropy", "largest_weight"), ("entropy / log n", "largest weight"), strict=True
    ):
        for axis, sink in zip(line, ("with", "without"), strict=True):
            for model in models:
                middle, low, high = (
                    by(pick(rows, metric, model, sink=sink, heads=heads), "n") for heads in ("mean", "10%", "90%")
                )
                colour, style = _look(models, model)
                ends = [v[0] for v in low.values()], [v[0] for v in high.values()]
                band(axis, list(middle), [v[0] for v in middle.values()], ends, colour, model, **style)
            axis.set(title=f"{words}, {sink} the first token", ylabel=words, ylim=(0, 1.02))
            tokens(axis, sorted({row.at["n"] for row in pick(rows, metric)}), "tokens n")
            axis.tick_params(axis="x", labelrotation=30)
    axes[0, 0].legend(fontsize=7)
    last = max(row.at["n"] for row in pick(rows, "attention_entropy"))
    ends = pick(rows, "attention_entropy", sink="with", heads="mean", n=last)
    title(
        figure,
        f"Entropy / log n of attention at {last:,} tokens: " + ", ".join(f"{r.variant} {r.value:.3f}" for r in ends),
    )
    return figure


def _powers(longest):
    return [2**k for k in range(3, 40) if 2**k <= longest]


# name -> (the metric that the figure needs, caption, function that draws it)
FIGURES: dict[str, tuple[str, str, Callable[[Sequence[Row], Sequence[str]], Figure]]] = {
    "loss": ("loss_by_position", "Loss at each position; band: 95 % confidence over documents.", _loss),
    "retrieval": ("retrieval_accuracy", "Share of numbers found, by context size and depth of the needle.", _retrieval),
    "needle_scores": (
        "needle_score",
        "Needle score of each head: its attention on the needle's tokens from the query that predicts the first token of the answer, "
        "mean over trials, sorted.",
        _needle_scores,
    ),
    "attention": (
        "attention_entropy",
        "Sharpness of attention by the number of tokens: mean over heads, band from the 10 % to the 90 % quantile of the heads.",
        _sharpness,
    ),
}
