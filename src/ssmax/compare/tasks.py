"""The retrieval tasks of ssmax evaluate, one entry each. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A retrieval task.

    Attributes:
        title: its name in reports.
        help: its text on the command line.
        make: (ssmax.compare.stages.Material of one model, prompt form) -> an object with
            grid(cells, rng), like ssmax.evaluation.NeedleTask.
    """

    title: str
    help: str
    make: Callable[[Any, Any], Any]


def _needle(material, form, **options):
    from ssmax.evaluation import NeedleTask  # loads torch

    return NeedleTask(material.encode, material.haystack, form=form, **options)


def _abc(material, form):
    from ssmax.evaluation import ABCDigits

    return ABCDigits(material.encode, form=form)


TASKS = {
    "needle": Task("one needle", "one sentence with a number, hidden in text (the paper's task)", _needle),
    "several": Task(
        "several needles, each asked",
        "a needle at each depth, each asked for in turn",
        lambda material, form: _needle(material, form, several=True),
    ),
    "distractors": Task(
        "one needle, distractors",
        "further needles that are not asked for",
        lambda material, form: _needle(material, form, distractors=material.settings.distractors),
    ),
    "abc": Task("letters with digits", "lines like A=482910, one of them asked for", _abc),
}
