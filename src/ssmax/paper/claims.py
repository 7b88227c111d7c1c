"""The registered claims, each with what was measured here, its interval and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ssmax.paper.measured import MEASURES, UNITS, Values, far_texts, learned, raised
from ssmax.paper.registered import ABSTRACT, LEARNED, REGISTERED, Registered
from ssmax.paper.statistics import Paired, bootstrap
from ssmax.plots.select import FORM_NAMES, NAMES, Spread, by, forms, pick
from ssmax.runs.rows import Row

__all__ = ["HOLDS", "HOLDS_NOT", "OPEN", "RULE", "Claim", "Headline", "claims", "headlines", "law_fits", "learned_p"]

HOLDS, HOLDS_NOT, OPEN = "holds", "does not hold", "open"
RULE = (
    "A verdict compares models of the same seed, which share initial weights and data: the difference is taken seed by seed, "
    "and its 95 % interval is Student's t over the seeds. A claim holds where the whole interval lies on its side of zero, and "
    "does not hold where the whole interval lies on the other side; otherwise it is open, and the number of seeds is given that "
    "would decide it if mean and deviation stayed as they are. d is the mean difference in standard deviations over seeds. "
    "Where losses of single texts were kept, a bootstrap over texts says in how many seeds the difference also leaves zero when "
    "the texts are drawn anew. The claims were registered before the run (paper/registered.py), none was chosen by its outcome; "
    "with so many of them one in forty would seem to hold by chance."
)


@dataclass(frozen=True)
class Claim:
    """One line of the claims table; figure is the paper's number, or "counting"."""

    figure: int | str
    claim: str
    paper: str
    measured: str
    verdict: str
    name: str = ""
    form: str = ""
    values: tuple[float, float] = (
        float("nan"),
        float("nan"),
    )  # of the claimed model and of the other, means over seeds
    paired: Paired = field(default_factory=lambda: Paired(()))


@dataclass(frozen=True)
class Headline:
    """One thing that the abstract claims, in plain words, with the claim that it is judged by."""

    title: str
    words: str
    claim: Claim


@dataclass(frozen=True)
class Fit:
    """A least-squares fit: its curve at the points, its formula with numbers, and R² (nan for constant values)."""

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
        r2 = 0.0 if x is None and scatter else r2  # exactly, where rounding leaves -0.000
        fits[name] = Fit(formula.format(*solution), curve, r2)
    return fits


def claims(rows: Sequence[Row], train_length: int) -> list[Claim]:
    """Return every claim that the rows can speak of, in the order of the paper's figures, the counter-test last."""
    found = [_fading(rows), _lead(rows)]
    found += [_logarithmic(rows, form, train_length) for form in forms(pick(rows, "learned_p"))]
    for registered in REGISTERED:
        for form in forms([row for row in rows if row.variant in NAMES]):
            values = MEASURES[registered.measure](rows, form, train_length)
            if all(model in values for model in registered.models):
                found.append(_judged(registered, rows, form, train_length, values))
    found += [_score_and_success(rows, form) for form in forms(pick(rows, "top_needle_score"))]
    return sorted(found, key=lambda claim: (isinstance(claim.figure, str), claim.figure))


def headlines(found: Sequence[Claim]) -> list[Headline]:
    """Return what the abstract claims, line by line, judged in the paper's form where that was run, otherwise in the first."""
    lines = []
    for line in ABSTRACT:
        claim = next((claim for claim in found if claim.name == line.claim), None)
        if claim is not None:
            x, y = (format(value, line.format) for value in claim.values)
            words = line.words.format(x=x, y=y) if claim.paired.seeds else f"{claim.measured}."
            lines.append(Headline(line.title, words[0].upper() + words[1:], claim))
    return lines


def verdict(differences: Sequence[float]) -> str:
    """Judge differences, one for each seed, that the claim says are positive: the 95 % interval has to leave zero."""
    paired = Paired(tuple(differences))
    low, high = paired.interval
    return HOLDS if low > 0 else HOLDS_NOT if high < 0 else OPEN


def _judged(registered: Registered, rows, form, train_length, values: Values) -> Claim:
    texts = {
        "theta": raised(rows, "loss_by_position"),
        "score_span": max((row.at["length"] for row in rows if row.metric == "needle_score"), default=0)
        // train_length,
    }
    unit, models = UNITS.get(registered.measure, ""), registered.models
    seeds = [seed for seed in values[models[0]] if all(seed in values[model] for model in models)]
    # The differences are those of the claim: positive where a seed bears it out.
    if registered.judge == "nearer":
        gaps = [[abs(values[models[0]][seed] - values[other][seed]) for seed in seeds] for other in models[1:]]
        differences = [far - near for near, far in zip(*gaps, strict=True)]
        near, far = (Spread(tuple(gap)) for gap in gaps)
        measured = f"{NAMES[models[0]]} is {near:.3f} from {NAMES[models[1]]}, {far:.3f} from {NAMES[models[2]]}{unit}"
        means, shown = (near.mean, far.mean) if seeds else (float("nan"),) * 2, 1
    else:
        x, y = (Spread(tuple(values[model][seed] for seed in seeds)) for model in models)
        shown = -1 if registered.judge == "lower" else 1  # the sign that the difference is printed with
        differences = [shown * (a - b) for a, b in zip(x.values, y.values, strict=True)]
        measured = f"{NAMES[models[1]]} {y:.3f}, {NAMES[models[0]]} {x:.3f}{unit}" if seeds else "nothing to compare"
        means = (x.mean, y.mean) if seeds else (float("nan"),) * 2
    paired = Paired(tuple(shown * value for value in differences))
    notes = [measured, interval_words(paired)] if seeds else [measured]
    if registered.measure == "far" and registered.judge == "lower":
        notes += _over_texts(rows, form, train_length, models, seeds)
    if registered.measure in ("needles", "far-needles"):
        notes += _who_learned(rows, form, train_length, models)
    return Claim(
        registered.figure,
        f"{registered.text.format(**texts)} ({FORM_NAMES[form]})",
        registered.paper,
        "; ".join(notes),
        verdict(differences) if seeds else OPEN,
        registered.name,
        form,
        means,
        paired,
    )


def interval_words(paired: Paired) -> str:
    """Return difference, interval, seeds, effect and, where zero lies inside, the seeds that would decide it."""
    count = f"{paired.seeds} seed{'s' * (paired.seeds > 1)}"
    if paired.seeds < 2:
        return f"difference {paired.mean:+.3f} ({count}: no interval)"
    low, high = paired.interval
    effect = f", d {paired.effect:+.1f}" if paired.deviation else ""
    words = f"difference {paired.mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f} ({count}{effect})"
    if low <= 0 <= high:
        needed = paired.seeds_needed
        words += (
            f"; to decide it takes about {needed} seeds" if needed else "; more than 1,000 seeds would not decide it"
        )
    return words


def _over_texts(rows, form, train_length, models, seeds):
    """In how many seeds the difference leaves zero on the claim's side when the texts are drawn anew."""
    intervals = []
    for seed in seeds:
        x, y = (far_texts(rows, form, model, seed, train_length) for model in models)
        if x and len(x) == len(y):
            intervals.append(bootstrap([a - b for a, b in zip(x, y, strict=True)]))
    if not intervals:
        return []
    return [f"over texts (bootstrap) below zero in {sum(high < 0 for _, high in intervals)} of {len(intervals)} seeds"]


def _who_learned(rows, form, train_length, models):
    able = learned(rows, form, train_length)
    asked = [ok for model in models for ok in able.get(model, {}).values()]
    if not asked or all(asked):
        return []
    return [
        f"{len(asked) - sum(asked)} of {len(asked)} models did not learn the task (below {LEARNED:.0%} at the training "
        "length) and are left out with the model that they are compared with"
    ]


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


def learned_p(rows: Sequence[Row], form: str, train_length: int) -> list[Row]:
    """Return the rows of p_n that learned: n = 1 has one key, whose weight is 1, and the last n has no next token."""
    return [row for row in pick(rows, "learned_p", form=form) if 1 < row.at["n"] < train_length]


def _logarithmic(rows, form, train_length):
    fits = {}
    for seed in by(pick(rows, "learned_p", form=form), "seed"):
        curve = by([row for row in learned_p(rows, form, train_length) if row.seed == seed], "n")
        fits[seed] = law_fits(list(curve), np.array([values[0] for values in curve.values()]))
    log, line = (Spread(tuple(fit[name].r2 for fit in fits.values())) for name in ("log", "linear"))
    gains = [a - max(b, 0.0) for a, b in zip(log.values, line.values, strict=True)]
    return Claim(
        2,
        f"A factor learned freely for each n is logarithmic in n, rather than linear or constant ({FORM_NAMES[form]})",
        "p_n = a1 log n + a2 fits the learned values",
        f"R² of a1 log n + a2: {log:.3f}; of a line {line:.3f}; of a constant 0; {interval_words(Paired(tuple(gains)))}",
        verdict(gains),
        "law",
        form,
    )


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
    measured = (
        f"top score when right {Spread(tuple(right)):.3f}, when wrong {Spread(tuple(wrong)):.3f}; "
        f"{interval_words(Paired(tuple(gaps)))}"
    )
    return Claim(8, text, "they do", measured, verdict(gaps), "score", form)
