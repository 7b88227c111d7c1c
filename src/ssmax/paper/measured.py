"""The measures that registered claims compare: from rows, one value for each model and seed of a form."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ssmax.paper.models import FORMS, VARIANTS
from ssmax.paper.registered import LEARNED
from ssmax.plots.select import pick
from ssmax.runs.rows import Row

# Names of models and forms in figures and tables.
NAMES = {variant.letter: variant.title for variant in VARIANTS.values() if variant.measured}
FORM_NAMES = {form.name: form.title for form in FORMS.values()}

ROPES = {"theta": "theta", "llama3": "Llama 3.1's RoPE"}  # names of needle_rope

Values = dict[str, dict[int, float]]  # model -> seed -> value


def forms(rows: Sequence[Row]) -> list[str]:
    """Return the model forms among the rows, the paper's first."""
    return sorted({row.at["form"] for row in rows if "form" in row.at}, key=list(FORM_NAMES).index)


def variants(rows: Sequence[Row]) -> list[str]:
    """Return the letters of the models among the rows."""
    return sorted({row.variant for row in rows if row.variant in NAMES})


def largest_factor(rows: Sequence[Row], metric: str) -> int:
    """Return the largest factor by which RoPE was stretched where a metric was measured; 1 without rows."""
    return max((row.at["theta_factor"] for row in rows if row.metric == metric), default=1)


def stretch(row: Row) -> str:
    """Return how RoPE was stretched for a row of needles, for people."""
    return f"{ROPES[row.at.get('rope', 'theta')]} × {row.at['theta_factor']}"


def _means(
    rows: Sequence[Row], metric: str, form: str, chosen: Callable[[Row], bool] = lambda row: True, **at: Any
) -> Values:
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in pick(rows, metric, form=form, **at):
        if row.variant in NAMES and row.seed is not None and chosen(row):
            values[row.variant][row.seed].append(row.value)
    return {model: {seed: float(np.mean(v)) for seed, v in of_seeds.items()} for model, of_seeds in values.items()}


def _trained(rows, form, train_length):
    last = max((row.at["step"] for row in pick(rows, "train_loss", stage="pretrain")), default=0)
    return _means(rows, "train_loss", form, lambda row: row.at["step"] > 0.9 * last, stage="pretrain")


def _loss(rows, form, chosen):
    return _means(rows, "loss_by_position", form, chosen, theta_factor=largest_factor(rows, "loss_by_position"))


def _loss_between(first, last=math.inf):
    """Return a measure: the loss at positions between these multiples of the training length."""

    def measure(rows, form, length):
        return _loss(rows, form, lambda row: row.at["from"] > first * length and row.at["position"] <= last * length)

    return measure


def _rise(rows, form, train_length):
    longest = max((row.at["position"] for row in rows if row.metric == "loss_by_position"), default=0)
    start = _loss(rows, form, lambda row: train_length / 2 < row.at["position"] <= train_length)
    end = _loss(rows, form, lambda row: row.at["position"] == longest)
    return {model: {seed: end[model][seed] - start[model][seed] for seed in start[model]} for model in start}


def learned_the_task(rows: Sequence[Row], form: str, train_length: int) -> dict[str, dict[int, bool]]:
    """Return for each model and seed whether it learned to retrieve: at the training length, under its trained theta.

    Models without this measurement are left out.
    """
    found = _means(rows, "retrieval_accuracy", form, lambda row: row.at["length"] == train_length, theta_factor=1)
    return {model: {seed: value >= LEARNED for seed, value in seeds.items()} for model, seeds in found.items()}


def _retrieval(rows, form, train_length, chosen):
    """Return the values of the models that learned the task; of all models if it was not measured whether they did."""
    able = learned_the_task(rows, form, train_length)
    found = _means(rows, "retrieval_accuracy", form, chosen, theta_factor=largest_factor(rows, "retrieval_accuracy"))
    return {
        model: {seed: value for seed, value in seeds.items() if able.get(model, {}).get(seed, True)}
        for model, seeds in found.items()
    }


def _exponent(rows, form, train_length):
    """Return the exponent of log n: the mean over heads if it is learned, 1 for s log n, 0 for a temperature without n."""
    exponents = _means(rows, "learned_scale", form, name="gamma")
    fixed = {"b": 1.0, "t": 0.0}
    return exponents | {model: dict.fromkeys(exponents.get("g", {}), fixed[model]) for model in fixed}


def _head(rows, form, train_length):
    """Return the needle score of the best head."""
    best: Values = defaultdict(dict)
    for row in pick(rows, "needle_score", form=form):
        if row.seed is not None:
            best[row.variant][row.seed] = max(row.value, best[row.variant].get(row.seed, 0.0))
    return dict(best)


def far_texts(rows: Sequence[Row], form: str, model: str, seed: int, train_length: int) -> list[float]:
    """Return each text's loss at 8 to 16 × the training length, in the order of the texts; empty if it was not kept."""
    losses = pick(rows, "text_loss", model, form=form, **{"from": 8 * train_length + 1})
    return [row.value for row in losses if row.seed == seed]


MEASURES: dict[str, Callable[[Sequence[Row], str, int], Values]] = {
    "training": lambda rows, form, length: _means(rows, "train_loss", form, stage="pretrain"),
    "trained": _trained,
    "short": _loss_between(0, 1),
    "far": _loss_between(8, 16),
    "farther": _loss_between(16),
    "rise": _rise,
    "needles": lambda rows, form, length: _retrieval(rows, form, length, lambda row: row.at["length"] > length),
    "far-needles": lambda rows, form, length: _retrieval(
        rows, form, length, lambda row: row.at["length"] >= 16 * length
    ),
    "exponent": _exponent,
    "head": _head,
    "top-score": lambda rows, form, length: _means(rows, "top_needle_score", form),
    "counting": lambda rows, form, length: _means(
        rows, "counting_accuracy", form, lambda row: row.at["length"] <= length
    ),
}
UNITS = dict.fromkeys(("training", "trained", "short", "far", "farther", "rise"), " nats")
