"""The time of training the recipe tiny over a bare loop of torch, and over that loop with other options."""

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmax.bench.measure import PLAIN, Comparison
from ssmax.nn import parameter_groups
from ssmax.paper.building import build_model
from ssmax.paper.recipes import Recipe, tiny
from ssmax.paper.training import pretrain
from ssmax.training.datasets import Windows

STEPS = 90  # the Trainer logs the loss of each step, up to 99


def measurements() -> Iterator[Comparison]:
    """The first 90 steps of a pretraining of 400, always from the same weights; all contenders end at the same loss."""
    recipe = dataclasses.replace(tiny(), steps=STEPS, warmup_steps=0)
    tokens = np.random.default_rng(0).integers(0, recipe.vocab_size, 400_000).astype(np.uint16)
    model = build_model(recipe, "paper", "b", 0, recipe.vocab_size)
    start = copy.deepcopy(model.state_dict())
    compiled: Any = torch.compile(model)
    calls: dict[str, Callable[[], float]] = {
        PLAIN: functools.partial(_loop, recipe, model, model, start, tokens),
        "ssmax train": functools.partial(_lab, recipe, model, start, tokens),
        "AdamW not fused": functools.partial(_loop, recipe, model, model, start, tokens, fused=False),
        "compiled": functools.partial(_loop, recipe, model, compiled, start, tokens),
    }
    wanted = calls[PLAIN]()

    def error(call: Callable[[], float]) -> float:
        return abs(call() - wanted)

    errors = {name: functools.partial(error, call) for name, call in calls.items()}
    at = {"case": f"{STEPS} steps", "tokens": STEPS * recipe.batch_size * recipe.train_length}
    yield Comparison(at, calls, 5, errors, allowed=1e-3)


def _loop(
    recipe: Recipe, model: Any, run: Any, start: dict[str, torch.Tensor], tokens: np.ndarray, fused: bool = True
) -> float:
    """Return the loss of the last step; run is the model, plain or compiled."""
    model.load_state_dict(start)
    model.train()
    groups = parameter_groups(model, recipe.learning_rate, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)
    windows = Windows(tokens, recipe.train_length, STEPS * recipe.batch_size, 0)
    loss = torch.zeros(())
    for step in range(STEPS):
        rows = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)
        batch = torch.stack([windows[i]["input_ids"] for i in rows])
        loss = run(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _lab(recipe: Recipe, model: Any, start: dict[str, torch.Tensor], tokens: np.ndarray) -> float:
    model.load_state_dict(start)
    with tempfile.TemporaryDirectory() as folder:
        return pretrain(model, recipe, tokens, 0, Path(folder), lambda tokens: None).losses[-1][1]
