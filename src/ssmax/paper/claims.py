"""Judges the registered claims: each gets what was measured, an interval and a verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ssmax.paper.measured import (
    FORM_NAMES,
    MEASURES,
    NAMES,
    UNITS,
    Values,
    far_texts,
    forms,
    largest_factor,
    learned_the_task,
)
from ssmax.paper.registered import ABSTRACT, LEARNED, Registered
from ssmax.paper.seeds import Differences
from ssmax.plots.select import Spread
from ssmax.plots.statistics import Paired, bootstrap
from ssmax.runs.rows import Row

HOLDS, HOLDS_NOT, OPEN = "holds", "does not hold", "open"
NOTHING = (math.nan, math.nan)
RULE = (
    "A verdict compares models of the same seed, which share initial weights and data. The difference is taken for each seed "
    "(for “nearer”, the difference of two distances), and the 95 % interval of its mean is Student's t over the seeds. A claim holds if the whole interval lies on the claimed side "
    "of zero. It does not hold if the whole interval lies on the other side. Otherwise it is open; then the table gives the number "
    "of seeds that would decide it if mean and deviation stayed the same. d is the mean difference in standard deviations over "
    "seeds. All seeds of a recipe are assumed to share one deviation. For the recipe tiny, the other seeds in paper/seeds.json "
    "therefore add to the deviation and to its degrees of freedom; the mean comes from this run's seeds alone. For the loss at 8 to 16 times the training length, a bootstrap draws the texts again and "
    "counts the seeds in which the whole interval lies below zero. Claims that compare models were registered before the run "
    "(paper/registered.py); none was chosen by its outcome. Of "
    "forty claims without any effect, about one would seem to hold by chance."
)


@dataclass(frozen=True)
class Claim:
    """One line of the claims table; figure is the paper's number, or a word such as "counting"."""

    figure: int | str
    claim: str
    paper: str
    measured: str
    verdict: str
    name: str = ""
    form: str = ""
    values: tuple[float, float] = NOTHING  # means over seeds, of the claimed model and of the other
    paired: Paired = field(default_factory=lambda: Paired(()))


@dataclass(frozen=True)
class Headline:
    """One claim of the paper's abstract in plain words, with the registered claim that judges it."""

    title: str
    words: str
    claim: Claim


def judged(
    registered: Sequence[Registered], rows: Sequence[Row], train_length: int, stored: Differences
) -> list[Claim]:
    """Judge the registered claims that the rows cover, once for each form; stored: what other seeds of the recipe gave."""
    found = []
    for claim in registered:
        for form in forms([row for row in rows if row.variant in NAMES]):
            values = MEASURES[claim.measure](rows, form, train_length)
            if all(model in values for model in claim.models):
                found.append(_judged(claim, rows, form, train_length, values, stored.get((form, claim.name), {})))
    return found


def headlines(found: Sequence[Claim]) -> list[Headline]:
    """Return the claims of the abstract, judged in the paper's form if it was run, otherwise in the first form."""
    lines = []
    for line in ABSTRACT:
        claim = next((claim for claim in found if claim.name == line.claim), None)
        if claim is not None:
            x, y = (format(value, line.format) for value in claim.values)
            words = line.words.format(x=x, y=y) if claim.paired.seeds else f"{claim.measured}."
            lines.append(Headline(line.title, words[0].upper() + words[1:], claim))
    return lines


def verdict(paired: Paired, sign: int = 1) -> str:
    """Return the verdict, by the 95 % interval, on differences that are claimed to be positive (sign 1) or negative (-1)."""
    low, high = sorted(sign * end for end in paired.interval)
    return HOLDS if low > 0 else HOLDS_NOT if high < 0 else OPEN


def _judged(registered: Registered, rows, form, train_length, values: Values, stored: Mapping[int, float]) -> Claim:
    texts = {
        "theta": largest_factor(rows, "loss_by_position"),
        "score_span": max((row.at["length"] for row in rows if row.metric == "needle_score"), default=0)
        // train_length,
    }
    unit, models = UNITS.get(registered.measure, ""), registered.models
    seeds = [seed for seed in values[models[0]] if all(seed in values[model] for model in models)]
    # A difference is positive if a seed agrees with the claim.
    if registered.judge == "nearer":
        gaps = [[abs(values[models[0]][seed] - values[other][seed]) for seed in seeds] for other in models[1:]]
        differences = [far - near for near, far in zip(*gaps, strict=True)]
        near, far = (Spread(tuple(gap)) for gap in gaps)
        measured = f"{NAMES[models[0]]} is {near:.3f} from {NAMES[models[1]]}, {far:.3f} from {NAMES[models[2]]}{unit}"
        means, shown = (near.mean, far.mean) if seeds else NOTHING, 1
    else:
        x, y = (Spread(tuple(values[model][seed] for seed in seeds)) for model in models)
        shown = -1 if registered.judge == "lower" else 1  # sign with which the difference is printed
        differences = [shown * (a - b) for a, b in zip(x.values, y.values, strict=True)]
        measured = f"{NAMES[models[1]]} {y:.3f}, {NAMES[models[0]]} {x:.3f}{unit}" if seeds else "nothing to compare"
        means = (x.mean, y.mean) if seeds else NOTHING
    others = tuple(value for seed, value in stored.items() if seed not in seeds)
    paired = Paired(tuple(shown * value for value in differences), others)
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
        verdict(paired, shown) if seeds else OPEN,
        registered.name,
        form,
        means,
        paired,
    )


def interval_words(paired: Paired) -> str:
    """Return as text: difference, interval, seeds, effect and, if the interval holds zero, the seeds that would decide it."""
    count = f"{paired.seeds} seed{'s' * (paired.seeds > 1)}"
    if not paired.freedom:
        return f"difference {paired.mean:+.3f} ({count}: no interval)"
    low, high = paired.interval
    pooled = f", deviation over {paired.seeds + len(paired.stored)}" if paired.stored else ""
    effect = f", d {paired.effect:+.1f}" if paired.deviation else ""
    words = f"difference {paired.mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f} ({count}{pooled}{effect})"
    if low <= 0 <= high:
        needed = paired.seeds_needed
        words += f"; to decide it takes about {needed} seeds" if needed else "; 1,000 seeds would not decide it"
    return words


def _over_texts(rows, form, train_length, models, seeds):
    """Return as text in how many seeds a bootstrap over texts keeps the difference on the claimed side of zero."""
    intervals = []
    for seed in seeds:
        x, y = (far_texts(rows, form, model, seed, train_length) for model in models)
        if x and len(x) == len(y):
            intervals.append(bootstrap([a - b for a, b in zip(x, y, strict=True)]))
    if not intervals:
        return []
    return [f"over texts (bootstrap) below zero in {sum(high < 0 for _, high in intervals)} of {len(intervals)} seeds"]


def _who_learned(rows, form, train_length, models):
    able = learned_the_task(rows, form, train_length)
    asked = [ok for model in models for ok in able.get(model, {}).values()]
    if not asked or all(asked):
        return []
    return [
        f"{len(asked) - sum(asked)} of {len(asked)} models did not learn the task (below {LEARNED:.0%} at the training "
        "length) and are left out with the model that they are compared with"
    ]
