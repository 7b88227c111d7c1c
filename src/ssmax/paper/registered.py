"""The claims that a run is judged by. The list is fixed before a run: its place in the code's history is its date.

Add claims, never remove one because of what came out; a change of a measure is a new claim.
"""

from dataclasses import dataclass
from typing import Literal

# Share of needles that a model has to find at its training length, under its trained theta, to have learned the task.
LEARNED = 0.9


@dataclass(frozen=True)
class Registered:
    """A claim of the paper and how it is judged.

    Attributes:
        name: one word, for the abstract's lines and for tests.
        figure: the name of a Figure in ssmax.paper.figures, such as the paper's number.
        text: the claim; {theta} and {score_span} stand for what was measured.
        paper: the paper's own finding, in short.
        measure: a name in ssmax.paper.measured.MEASURES; it gives one value for each model and
            seed.
        judge: the first model's value is lower or higher than the second's, or nearer to the
            second's than to the third's.
        models: letters.
    """

    name: str
    figure: int | str
    text: str
    paper: str
    measure: str
    judge: Literal["lower", "higher", "nearer"]
    models: tuple[str, ...]


def _far(name, text, paper, judge, models, figure=5):
    return Registered(
        name, figure, "At 8 to 16 × the training length, theta × {theta}, " + text, paper, "far", judge, models
    )


def _law(name, text, paper, models):
    return _far(name, text, paper, "lower", models, figure="laws")


def _needles(name, text, paper, models):
    return Registered(name, 6, "Past the training length " + text, paper, "needles", "higher", models)


REGISTERED = (
    Registered(
        "faster",
        4,
        "SSMax's loss falls faster: mean of the training loss over all steps of pretraining",
        "(b) below (a) throughout",
        "training",
        "lower",
        ("b", "a"),
    ),
    Registered(
        "lower",
        4,
        "SSMax ends pretraining at a lower training loss; last tenth of the steps",
        "(b) below (a)",
        "trained",
        "lower",
        ("b", "a"),
    ),
    Registered(
        "lower-c", 4, "SSMax without s ends lower than Softmax too", "(c) below (a)", "trained", "lower", ("c", "a")
    ),
    Registered(
        "nearer-c",
        4,
        "SSMax without s ends nearer to SSMax than to Softmax",
        "(b) about equal to (c)",
        "trained",
        "nearer",
        ("c", "b", "a"),
    ),
    Registered("lower-d", 4, "SSMax with bias ends lowest", "(d) lowest", "trained", "lower", ("d", "b")),
    _far("far", "SSMax's loss is lower", "(b) stays low up to 20 × the training length", "lower", ("b", "a")),
    Registered(
        "farther",
        5,
        "From 16 × the training length to the longest context, theta × {theta}, SSMax's loss is lower",
        "(b) stays low up to 20 × the training length",
        "farther",
        "lower",
        ("b", "a"),
    ),
    Registered(
        "rise",
        5,
        "From the training length to the longest context the loss rises less under SSMax, theta × {theta}",
        "(a) rises, (b) hardly",
        "rise",
        "lower",
        ("b", "a"),
    ),
    Registered(
        "short-e",
        5,
        "Within the training length the afterwards switched model is worse, theta × {theta}",
        "(e) bad at short",
        "short",
        "higher",
        ("e", "a"),
    ),
    _far("far-e", "the afterwards switched model is better than Softmax", "(e) gains at long", "lower", ("e", "a")),
    _far("far-c", "SSMax without s is better than Softmax", "(c) stays low", "lower", ("c", "a")),
    _far("far-d", "SSMax is better than SSMax with bias", "(d) worse than (b)", "lower", ("b", "d")),
    _far("far-f", "the late switched model is better than Softmax", "(f) close to (b)", "lower", ("f", "a")),
    _far(
        "nearer-f",
        "the late switched model is nearer to SSMax than to Softmax",
        "(f) close to (b)",
        "nearer",
        ("f", "b", "a"),
    ),
    _needles(
        "needles",
        "SSMax finds the needle more often; mean over context sizes and depths",
        "(b) high to about 10 × the training length, (a) fails",
        ("b", "a"),
    ),
    Registered(
        "far-needles",
        6,
        "At 16 × the training length and beyond SSMax finds the needle more often; mean over context sizes and depths",
        "(b) partly, (a) fails",
        "far-needles",
        "higher",
        ("b", "a"),
    ),
    _needles("needles-c", "SSMax finds the needle more often than SSMax without s", "(c) lower", ("b", "c")),
    _needles("needles-d", "SSMax finds the needle more often than SSMax with bias", "(d) lower", ("b", "d")),
    _needles("needles-e", "the afterwards switched model finds it more often than Softmax", "(e) partial", ("e", "a")),
    _needles("needles-f", "the late switched model finds it more often than Softmax", "(f) partial", ("f", "a")),
    Registered(
        "head",
        7,
        "At {score_span} × the training length SSMax's best head puts more attention on the needle",
        "(b) concentrates on the needle, (a) does not",
        "head",
        "higher",
        ("b", "a"),
    ),
    Registered(
        "top-score",
        8,
        "In a trial at {score_span} × the training length the highest needle score of any head is higher under SSMax",
        "(b) has the highest scores",
        "top-score",
        "higher",
        ("b", "a"),
    ),
    Registered(
        "counting",
        "counting",
        "Counting, which wants flat attention, suffers under SSMax; within the training length",
        "not in the paper: a counter-test",
        "counting",
        "lower",
        ("b", "a"),
    ),
    # Which law? Only the recipe laws trains these models. The paper column says what is expected, and from where.
    _law(
        "law-n",
        "s log n is better than a learned temperature without n",
        "it is n that helps, not sharpness",
        ("b", "t"),
    ),
    _law("law-sham", "a learned temperature without n is better than Softmax", "not expected: the control", ("t", "a")),
    _law(
        "law-power",
        "s (log n)^gamma, whose exponent starts at 1/2, is better than s log n",
        "not expected: Figure 2's p_n is logarithmic",
        ("g", "b"),
    ),
    _law("law-query", "the query-aware law is better than s log n", "open: TabICLv2 uses it for tables", ("q", "b")),
    _law(
        "law-llama",
        "s log n is better than Llama 4's law, put into the trained Softmax model",
        "expected: it learns",
        ("b", "l"),
    ),
    _law(
        "law-yarn",
        "s log n is better than YaRN's constant, put into the trained Softmax model",
        "expected: it learns",
        ("b", "y"),
    ),
    Registered(
        "law-exponent",
        "laws",
        "The learned exponent of log n, which starts at 1/2, ends nearer to 1 (s log n) than to 0 (no n); mean over heads",
        "expected: Figure 2's p_n is logarithmic",
        "exponent",
        "nearer",
        ("g", "b", "t"),
    ),
)


def registered(figure: int | str) -> tuple[Registered, ...]:
    """Return the claims of a figure."""
    return tuple(claim for claim in REGISTERED if claim.figure == figure)


@dataclass(frozen=True)
class Line:
    """One thing that the abstract claims, in plain words.

    Attributes:
        title: what the abstract claims.
        claim: the name of the registered claim that it is judged by.
        words: what was measured; {x} is the claimed model's value, {y} the other's.
        format: format of x and y.
    """

    title: str
    claim: str
    words: str
    format: str


ABSTRACT = (
    Line(
        "Faster loss reduction",
        "faster",
        "Over the whole of pretraining the mean loss on the training text is {x} nats under SSMax, {y} under Softmax.",
        ".3f",
    ),
    Line(
        "Better at long context",
        "far",
        "At positions 8 to 16 times the training length, SSMax's loss is {x} nats, Softmax's {y}.",
        ".3f",
    ),
    Line(
        "Key information retrieval",
        "far-needles",
        "Asked for a number hidden in a text at least 16 times as long as in training, SSMax names it in {x} of the trials, "
        "Softmax in {y}.",
        ".0%",
    ),
    Line(
        "Attention on key information",
        "head",
        "The head that looks most at the hidden number gives it {x} of its attention under SSMax, {y} under Softmax.",
        ".0%",
    ),
    Line(
        "Switching to SSMax during pretraining",
        "far-f",
        "A model that was switched for the last eighth of its training has a loss of {x} nats at positions 8 to 16 times "
        "the training length, one that stayed with Softmax {y}.",
        ".3f",
    ),
    Line(
        "Switching to SSMax after pretraining",
        "far-e",
        "The trained Softmax model, switched without further training, has a loss of {x} nats at positions 8 to 16 "
        "times the training length, instead of {y}.",
        ".3f",
    ),
)
