"""Figure 8: the best head's attention on the needle, trial by trial."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Drawing

from ssmax.paper.claims import OPEN, Claim, interval_words, verdict
from ssmax.paper.figure import Figure
from ssmax.paper.figures.parts import COLOURS
from ssmax.paper.measured import FORM_NAMES, NAMES, forms, variants
from ssmax.plots.drawing import panels, title
from ssmax.plots.select import Spread, by, pick
from ssmax.plots.statistics import Paired
from ssmax.runs.rows import Row


def _draw(rows: Sequence[Row], train_length: int) -> Drawing:
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


def _score_and_success(rows, form):
    gaps, right, wrong = [], [], []
    for seed in by(pick(rows, "top_needle_score", form=form), "seed"):
        trials = [row for row in pick(rows, "top_needle_score", form=form) if row.seed == seed]
        hits, misses = ([row.value for row in trials if row.at["correct"] is ok] for ok in (True, False))
        if hits and misses:
            gaps.append(float(np.mean(hits) - np.mean(misses)))
            right.append(float(np.mean(hits)))
            wrong.append(float(np.mean(misses)))
    text = f"A high needle score and a right answer go together ({FORM_NAMES[form]}; all models' trials)"
    if not gaps:
        return Claim(8, text, "they do", "every trial had the same outcome", OPEN, "score", form)
    paired = Paired(tuple(gaps))
    measured = (
        f"top score when right {Spread(tuple(right)):.3f}, when wrong {Spread(tuple(wrong)):.3f}; "
        f"{interval_words(paired)}"
    )
    return Claim(8, text, "they do", measured, verdict(paired), "score", form)


def _judge(rows, train_length):
    return [_score_and_success(rows, form) for form in forms(pick(rows, "top_needle_score"))]


FIGURE = Figure(
    name=8,
    metric="top_needle_score",
    caption=(
        "Figure 8. The highest needle score of any head in each trial, all seeds, marked by whether the "
        "answer was right."
    ),
    draw=_draw,
    judge=_judge,
)
