"""The paper's claims, each with what was measured here and a verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ssmax.report.select import FORM_NAMES, NAMES, Spread, by, forms, pick, spread, variants
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
    """One line of the claims table; figure is the paper's number, or "counting"."""

    figure: int | str
    claim: str
    paper: str
    measured: str
    verdict: str


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
    judges = {
        "learned_p": (_logarithmic,),
        "train_loss": (_training_loss, _training_others),
        "loss_by_position": (_long_loss, _rise, _long_others),
        "retrieval_accuracy": (_retrieval, _retrieval_others),
        "needle_score": (_best_head,),
        "top_needle_score": (_score_and_success,),
        "counting_accuracy": (_counting,),
    }
    for metric, functions in judges.items():
        for function in functions:
            for form in forms(pick(rows, metric)):
                made = function(rows, form, train_length)
                found += made if isinstance(made, list) else [made]
    return sorted(found, key=lambda claim: (isinstance(claim.figure, str), claim.figure))


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


Values = dict[int, list[float]]  # seed -> values of one model


def _seeds(count: int) -> str:
    return f"({count} seed{'s' if count > 1 else ''})"


def _lower(model: str, other: str, values: dict[str, Values], unit: str, sign: int = -1) -> tuple[str, str]:
    """Judge, seed by seed, that a model has lower values than another one; return (measured, verdict)."""
    x, y = values[model], values[other]
    difference = Spread(tuple(float(np.mean(x[seed]) - np.mean(y[seed])) for seed in x))
    measured = f"{NAMES[other]} {spread(y):.3f}, {NAMES[model]} {spread(x):.3f}{unit}; difference {difference:+.3f} {_seeds(len(x))}"
    return measured, verdict(Spread(tuple(sign * d for d in difference.values)))


def _higher(model: str, other: str, values: dict[str, Values], unit: str) -> tuple[str, str]:
    return _lower(model, other, values, unit, sign=1)


def _nearer(model: str, near: str, far: str, values: dict[str, Values], unit: str) -> tuple[str, str]:
    """Judge, seed by seed, that a model lies nearer to one model than to another."""
    x, a, b = (values[v] for v in (model, near, far))
    gaps = [Spread(tuple(abs(float(np.mean(x[seed]) - np.mean(other[seed]))) for seed in x)) for other in (a, b)]
    gain = Spread(tuple(gaps[1].values[i] - gaps[0].values[i] for i in range(len(x))))
    measured = (
        f"{NAMES[model]} is {gaps[0]:.3f} from {NAMES[near]}, {gaps[1]:.3f} from {NAMES[far]}{unit} {_seeds(len(x))}"
    )
    return measured, verdict(gain)


def _of_models(rows: Sequence[Row], form: str, metric: str, value: Callable[[str], Values]) -> dict[str, Values]:
    return {variant: value(variant) for variant in variants(pick(rows, metric, form=form))}


def _made(figure, form, values, unit, entries):
    """Claims whose models were all trained; an entry is (claim, the paper's words, judge, its models)."""
    return [
        Claim(figure, f"{text} ({FORM_NAMES[form]})", paper, *judge(*models, values, unit))
        for text, paper, judge, models in entries
        if set(models) <= set(values)
    ]


def learned_p(rows: Sequence[Row], form: str, train_length: int) -> list[Row]:
    """Return the rows of p_n that learned: n = 1 has one key, whose weight is 1, and the last n has no next token."""
    return [row for row in pick(rows, "learned_p", form=form) if 1 < row.at["n"] < train_length]


def _logarithmic(rows, form, train_length):
    fits = {}
    for seed in by(pick(rows, "learned_p", form=form), "seed"):
        curve = by([row for row in learned_p(rows, form, train_length) if row.seed == seed], "n")
        fits[seed] = law_fits(list(curve), np.array([values[0] for values in curve.values()]))
    log, line = (Spread(tuple(fit[name].r2 for fit in fits.values())) for name in ("log", "linear"))
    return Claim(
        2,
        f"A factor learned freely for each n is logarithmic in n, rather than linear or constant ({FORM_NAMES[form]})",
        "p_n = a1 log n + a2 fits the learned values",
        f"R² of a1 log n + a2: {log:.3f}; of a line {line:.3f}; of a constant 0 {_seeds(len(fits))}",
        verdict(Spread(tuple(a - max(b, 0.0) for a, b in zip(log.values, line.values, strict=True)))),
    )


def _training_values(rows, form):
    def value(variant):
        losses = pick(rows, "train_loss", variant, form=form, stage="pretrain")
        last = max(row.at["step"] for row in losses)
        return by([row for row in losses if row.at["step"] > 0.9 * last], "seed")

    return _of_models(pick(rows, "train_loss", stage="pretrain"), form, "train_loss", value)


def _training_loss(rows, form, train_length):
    text = "SSMax ends pretraining at a lower training loss; last tenth of the steps"
    entry = (text, "(b) below (a) throughout", _lower, ("b", "a"))
    return _made(4, form, _training_values(rows, form), " nats", [entry])


def _training_others(rows, form, train_length):
    entries = [
        ("SSMax without s ends lower than Softmax too", "(c) below (a)", _lower, ("c", "a")),
        ("SSMax without s ends nearer to SSMax than to Softmax", "(b) about equal to (c)", _nearer, ("c", "b", "a")),
        ("SSMax with bias ends lowest", "(d) lowest", _lower, ("d", "b")),
    ]
    return _made(4, form, _training_values(rows, form), " nats", entries)


def _position_values(rows, form, chosen):
    factor = _raised(rows, "loss_by_position")

    def value(variant):
        losses = pick(rows, "loss_by_position", variant, form=form, theta_factor=factor)
        return by([row for row in losses if chosen(row)], "seed")

    return _of_models(rows, form, "loss_by_position", value)


def _raised(rows, metric):
    return max(row.at["theta_factor"] for row in rows if row.metric == metric)


def _far_values(rows, form, train_length):
    return _position_values(rows, form, lambda row: row.at["from"] > 8 * train_length)


def _span(rows, train_length):
    longest = max(row.at["position"] for row in rows if row.metric == "loss_by_position")
    return f"At 8 to {longest // train_length} × the training length, theta × {_raised(rows, 'loss_by_position')},"


def _measures_far(rows, train_length):
    return any(row.metric == "loss_by_position" and row.at["from"] > 8 * train_length for row in rows)


def _long_loss(rows, form, train_length):
    if not _measures_far(rows, train_length):
        text = f"SSMax's loss is lower far past the training length ({FORM_NAMES[form]})"
        return Claim(5, text, "", "not measured", OPEN)
    entry = (
        f"{_span(rows, train_length)} SSMax's loss is lower",
        "(b) stays low up to 20 × the training length",
        _lower,
        ("b", "a"),
    )
    return _made(5, form, _far_values(rows, form, train_length), " nats", [entry])


def _rise(rows, form, train_length):
    def near(row):
        return train_length / 2 < row.at["position"] <= train_length

    longest = max(row.at["position"] for row in rows if row.metric == "loss_by_position")
    start = _position_values(rows, form, near)
    end = _position_values(rows, form, lambda row: row.at["position"] == longest)
    rises = {v: {seed: [float(np.mean(end[v][seed]) - np.mean(start[v][seed]))] for seed in start[v]} for v in start}
    text = f"From the training length to the longest context the loss rises less under SSMax, theta × {_raised(rows, 'loss_by_position')}"
    return _made(5, form, rises, " nats", [(text, "(a) rises, (b) hardly", _lower, ("b", "a"))])


def _long_others(rows, form, train_length):
    short = _position_values(rows, form, lambda row: row.at["position"] <= train_length)
    entry = (
        "Within the training length the afterwards switched model is worse",
        "(e) bad at short",
        _higher,
        ("e", "a"),
    )
    found = _made(5, form, short, " nats", [entry])
    if not _measures_far(rows, train_length):
        return found
    span = _span(rows, train_length)
    entries = [
        (f"{span} the afterwards switched model is better than Softmax", "(e) gains at long", _lower, ("e", "a")),
        (f"{span} SSMax without s is better than Softmax", "(c) stays low", _lower, ("c", "a")),
        (f"{span} SSMax is better than SSMax with bias", "(d) worse than (b)", _lower, ("b", "d")),
        (
            f"{span} the late switched model is nearer to SSMax than to Softmax",
            "(f) close to (b)",
            _nearer,
            ("f", "b", "a"),
        ),
    ]
    return found + _made(5, form, _far_values(rows, form, train_length), " nats", entries)


def _retrieval_values(rows, form, train_length):
    def value(variant):
        cells = pick(rows, "retrieval_accuracy", variant, form=form)
        return by([row for row in cells if row.at["length"] > train_length], "seed")

    return _of_models(rows, form, "retrieval_accuracy", value)


def _retrieval(rows, form, train_length):
    text = "Past the training length SSMax finds the needle more often; mean over context sizes and depths"
    entry = (text, "(b) high to about 10 × the training length, (a) fails", _higher, ("b", "a"))
    return _made(6, form, _retrieval_values(rows, form, train_length), "", [entry])


def _retrieval_others(rows, form, train_length):
    text = "Past the training length {} the needle more often than {}"
    entries = [
        (text.format("SSMax finds", "SSMax without s"), "(c) lower", _higher, ("b", "c")),
        (text.format("SSMax finds", "SSMax with bias"), "(d) lower", _higher, ("b", "d")),
        (text.format("the afterwards switched model finds", "Softmax"), "(e) partial", _higher, ("e", "a")),
        (text.format("the late switched model finds", "Softmax"), "(f) partial", _higher, ("f", "a")),
    ]
    return _made(6, form, _retrieval_values(rows, form, train_length), "", entries)


def _counting(rows, form, train_length):
    def value(variant):
        answers = pick(rows, "counting_accuracy", variant, form=form)
        return by([row for row in answers if row.at["length"] <= train_length], "seed")

    text = "Counting, which wants flat attention, suffers under SSMax; within the training length"
    entry = (text, "not in the paper: a counter-test", _lower, ("b", "a"))
    return _made("counting", form, _of_models(rows, form, "counting_accuracy", value), "", [entry])


def _best_head(rows, form, train_length):
    def value(variant):
        scores = by(pick(rows, "needle_score", variant, form=form), "seed")
        return {seed: [max(heads)] for seed, heads in scores.items()}

    length = next(row.at["length"] for row in rows if row.metric == "needle_score")
    text = f"At {length // train_length} × the training length SSMax's best head puts more attention on the needle"
    entry = (text, "(b) concentrates on the needle, (a) does not", _higher, ("b", "a"))
    return _made(7, form, _of_models(rows, form, "needle_score", value), "", [entry])


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
