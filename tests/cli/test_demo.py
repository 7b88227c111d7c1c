"""The demo's models are there, and what the page shows of them is what they compute. A browser: tests/test_demo_page.py."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from ssmax.demo import measure
from ssmax.demo.run import facts_of, page
from ssmax.evaluation import needle_scores, rope_scaling


@pytest.fixture(scope="module")
def short():
    """What ships, with texts of four training lengths."""
    shipped = measure.load()
    return dataclasses.replace(shipped, texts=shipped.texts[:2, : 4 * shipped.train_length + 1])


def test_what_ships_is_small_and_says_where_it_comes_from(short):
    sizes = [sum(file.stat().st_size for file in measure.FOLDER.glob(f"{name}*/*")) for name in measure.MODELS]
    assert max(sizes) < 3_000_000
    assert {"recipe", "seed", "corpus", "commit", "torch", "train_length"} <= set(short.provenance)
    for models in (short.pretrained, short.retrieval):
        scaled = {name: any(".ssmax." in key for key in model.state_dict()) for name, model in models.items()}
        assert scaled == {"softmax": False, "ssmax": True}


def test_the_page_shows_what_the_models_compute(short):
    facts = facts_of(short, lambda tokens: None, trials=1)
    found = json.loads(re.search(r"const facts = (.*);\n", page(facts))[1])
    assert [view["n"] for view in found["views"]] == [len(view["tokens"]) for view in found["views"]]
    assert len(found["views"]) == len(short.lengths) == 3
    for view in found["views"]:
        for shown in view["models"].values():
            assert sum(shown["weights"]) == pytest.approx(1, abs=len(shown["weights"]) * 0.5e-5)  # rounded to 5 digits
            first, stop = view["span"]
            assert shown["needle"] == pytest.approx(sum(shown["weights"][first:stop]), abs=(stop - first) * 1e-5)
    model, shown = short.retrieval["ssmax"], found["views"][-1]["models"]["ssmax"]
    layer, head = map(int, re.findall(r"\d+", found["heads"]["ssmax"]))
    example = short.task().example(short.lengths[-1], 0.5, np.random.default_rng([short.lengths[-1], 1]))
    with rope_scaling(model, short.needle_rope):
        scores = needle_scores(model, torch.tensor(example.prompt), example.span)
    assert shown["needle"] == pytest.approx(scores[layer, head].item(), abs=1e-5)


def test_no_text_can_end_the_pages_script():
    assert "</script><b>" not in page({"tokens": ["</script><b>"]})
