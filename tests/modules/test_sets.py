"""docs/sets.md says what its rows say, and both variants start as the same model."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def sets():
    spec = importlib.util.spec_from_file_location("sets_page", DOCS / "sets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_its_rows(sets):
    rows = sets.judged()
    assert {row.seed for row in rows} == set(sets.SEEDS)
    assert len(rows) == len(sets.SEEDS) * len(sets.TASKS) * len(sets.VARIANTS) * len(sets.SIZES)
    assert sets.PAGE.read_text() == sets.page(rows)


def test_both_variants_start_as_the_same_model(sets):
    for task in sets.TASKS:
        x, target = task.batch(8, sets.TRAINED, torch.Generator().manual_seed(0))
        softmax, ssmax = (sets.trained(task, variant, 0, steps=0)(x) for variant in sets.VARIANTS)
        torch.testing.assert_close(softmax, ssmax, atol=1e-5, rtol=1e-5)
        assert task.score(softmax, target).shape == (8,)


def test_tasks_say_what_they_say(sets):
    x, target = sets.Needle.batch(5, 9, torch.Generator().manual_seed(1))
    marked = x[:, 1:, sets.CLASSES] == 1
    assert marked.sum(1).tolist() == [1] * 5
    assert torch.equal(x[:, 1:, : sets.CLASSES][marked].argmax(-1), target)
    x, target = sets.Mean.batch(5, 9, torch.Generator().manual_seed(1))
    assert torch.allclose(x[:, 1:, 0].mean(1), target[:, 0])


@pytest.mark.parametrize(
    ("interval", "holds", "words"),
    [
        ((0.1, 0.2), "above", "holds"),
        ((-0.2, -0.1), "above", "does not hold"),
        ((-0.1, 0.2), "above", "open"),
        ((-0.1, 0.2), "around", "holds"),
        ((0.1, math.inf), "around", "does not hold"),
    ],
)
def test_verdicts(sets, interval, holds, words):
    assert sets.verdict(interval, holds) == words
