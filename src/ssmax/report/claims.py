"""The paper's claims, each with what was measured here and a verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ssmax.report.select import FORM_NAMES, Spread, by, forms, pick, spread, variants
from ssmax.results import Row

__all__ = ["HOLDS", "HOLDS_NOT", "OPEN", "RULE", "Claim", "claims"]

HOLDS, HOLDS_NOT, OPEN = "holds", "does not hold", "not measurable at this size"
RULE = (
    "A verdict compares models of the same seed, which share initial weights and data. It is “holds” or “does not hold” "
    "only where every one of at least two seeds agrees and the mean difference exceeds its standard deviation over "
    "seeds; otherwise the claim is not measurable at this size."
)


@dataclass(frozen=True)
class Claim:
    """One line of the claims table."""

    figure: int
    claim: str
    paper: str
    measured: str
    verdict: str


def claims(rows: Sequence[Row], train_length: int) -> list[Claim]:
    """Return every claim that the rows can speak of, in the order of the paper's figures."""
    found = [_fading(rows), _lead(rows)]
    if {"a", "b"} <= set(variants(rows)):
        for judge in (_training_loss, _long_loss, _rise, _retrieval, _best_head, _score_and_success):
            found += [judge(rows, form, train_length) for form in forms(rows)]
    return sorted(found, key=lambda claim: claim.figure)


def verdict(differences: Spread) -> str:
    """Judge differences that the claim says are positive."""
    values = differences.values
    if len(values) < 2 or abs(differences.mean) <= differences.deviation:
        return OPEN
    if all(value > 0 for value in values):
        return HOLDS
    return HOLDS_NOT if all(value <= 0 for value in values) else OPEN


def _fading(rows):
    weights = {variant: by(pick(rows, "max_weight", variant), "n") for variant in "ab"}
    n = max(weights["a"])
    a, b = (weights[variant][n][0] for variant in "ab")
    return Claim(
        1,
        "The largest Softmax weight fades as the number of keys grows; SSMax's does not",
        "Softmax → 0, SSMax stays near 1 (s = 0.43)",
        f"at {n:,} keys: Softmax {a:.4f}, SSMax {b:.4f}",
        HOLDS if a < 0.5 < b else HOLDS_NOT,
    )


def crossing(rows: Sequence[Row], variant: str, n: int, s: float | None) -> float:
    """Return the z_max whose weight is 1/2, by linear interpolation."""
    curve = by(pick(rows, "focus_weight", variant, n=n, s=s), "z_max")
    return float(np.interp(0.5, [value[0] for value in curve.values()], [float(z) for z in curve]))


def _lead(rows):
    few, many = 100, 100_000
    softmax = [crossing(rows, "a", n, None) for n in (few, many)]
    ssmax = [crossing(rows, "b", n, 0.43) for n in (few, many)]
    return Claim(
        3,
        "The lead that a key needs to hold half of the attention grows with log n under Softmax, not under SSMax",
        "SSMax focuses at a lead of about 1/s, whatever n is",
        f"from {few} to {many:,} keys z_max for weight 1/2 moves {softmax[0]:.2f} → {softmax[1]:.2f} under Softmax, "
        f"{ssmax[0]:.2f} → {ssmax[1]:.2f} under SSMax (s = 0.43)",
        HOLDS if ssmax[1] - ssmax[0] < 0.1 * (softmax[1] - softmax[0]) else HOLDS_NOT,
    )


def _paired(rows: Sequence[Row], value: Callable[[str], dict], unit: str, sign: int = 1) -> tuple[str, str]:
    """Compare b with a seed by seed; sign = 1 where the claim says that b is higher. Return (measured, verdict)."""
    a, b = value("a"), value("b")
    difference = Spread(tuple(float(np.mean(b[seed]) - np.mean(a[seed])) for seed in a))
    seeds = f"{len(a)} seed{'s' if len(a) > 1 else ''}"
    measured = f"Softmax {spread(a):.3f}, SSMax {spread(b):.3f}{unit}; difference {difference:+.3f} ({seeds})"
    return measured, verdict(Spread(tuple(sign * d for d in difference.values)))


def _training_loss(rows, form, train_length):
    def value(variant):
        losses = pick(rows, "train_loss", variant, form=form, stage="pretrain")
        last = max(row.at["step"] for row in losses)
        return by([row for row in losses if row.at["step"] > 0.9 * last], "seed")

    measured, judged = _paired(rows, value, " nats", sign=-1)
    text = f"SSMax ends pretraining at a lower training loss ({FORM_NAMES[form]}; last tenth of the steps)"
    return Claim(4, text, "(b) below (a) throughout", measured, judged)


def _far(rows, variant, form, train_length, factor):
    losses = pick(rows, "loss_by_position", variant, form=form, theta_factor=factor)
    return by([row for row in losses if row.at["from"] > 8 * train_length], "seed")


def _raised(rows, metric):
    return max(row.at["theta_factor"] for row in rows if row.metric == metric)


def _long_loss(rows, form, train_length):
    factor = _raised(rows, "loss_by_position")
    longest = max(row.at["position"] for row in rows if row.metric == "loss_by_position")
    if longest <= 8 * train_length:
        return Claim(
            5, f"SSMax's loss is lower far past the training length ({FORM_NAMES[form]})", "", "not measured", OPEN
        )
    measured, judged = _paired(rows, lambda v: _far(rows, v, form, train_length, factor), " nats", sign=-1)
    text = f"At 8 to {longest // train_length} × the training length, theta × {factor}, SSMax's loss is lower ({FORM_NAMES[form]})"
    return Claim(5, text, "(b) stays low up to 20 × the training length", measured, judged)


def _rise(rows, form, train_length):
    factor = _raised(rows, "loss_by_position")

    def value(variant):
        losses = pick(rows, "loss_by_position", variant, form=form, theta_factor=factor)
        near = by([row for row in losses if train_length / 2 < row.at["position"] <= train_length], "seed")
        last = by([row for row in losses if row.at["position"] == max(r.at["position"] for r in losses)], "seed")
        return {seed: [float(np.mean(last[seed]) - np.mean(near[seed]))] for seed in near}

    measured, judged = _paired(rows, value, " nats", sign=-1)
    text = f"From the training length to the longest context the loss rises less under SSMax (theta × {factor}, {FORM_NAMES[form]})"
    return Claim(5, text, "(a) rises, (b) hardly", measured, judged)


def _retrieval(rows, form, train_length):
    def value(variant):
        cells = pick(rows, "retrieval_accuracy", variant, form=form)
        return by([row for row in cells if row.at["length"] > train_length], "seed")

    measured, judged = _paired(rows, value, "")
    text = f"Past the training length SSMax finds the needle more often ({FORM_NAMES[form]}; mean over context sizes and depths)"
    return Claim(6, text, "(b) high to about 10 × the training length, (a) fails", measured, judged)


def _best_head(rows, form, train_length):
    def value(variant):
        scores = by(pick(rows, "needle_score", variant, form=form), "seed")
        return {seed: [max(heads)] for seed, heads in scores.items()}

    measured, judged = _paired(rows, value, "")
    length = next(row.at["length"] for row in rows if row.metric == "needle_score")
    text = f"At {length // train_length} × the training length SSMax's best head puts more attention on the needle ({FORM_NAMES[form]})"
    return Claim(7, text, "(b) concentrates on the needle, (a) does not", measured, judged)


def _score_and_success(rows, form, train_length):
    gaps, right, wrong = [], [], []
    for seed in by(pick(rows, "top_needle_score", form=form), "seed"):
        trials = [row for row in pick(rows, "top_needle_score", form=form) if row.seed == seed]
        hits, misses = ([row.value for row in trials if row.at["correct"] is ok] for ok in (True, False))
        if hits and misses:
            gaps.append(float(np.mean(hits) - np.mean(misses)))
            right.append(float(np.mean(hits)))
            wrong.append(float(np.mean(misses)))
    text = f"A high needle score and a right answer go together ({FORM_NAMES[form]}; both models' trials)"
    if not gaps:
        return Claim(8, text, "they do", "every trial had the same outcome", OPEN)
    measured = (
        f"top score when right {Spread(tuple(right)):.3f}, when wrong {Spread(tuple(wrong)):.3f} "
        f"({len(gaps)} seed{'s' if len(gaps) > 1 else ''})"
    )
    return Claim(8, text, "they do; (b) has the highest scores", measured, verdict(Spread(tuple(gaps))))
