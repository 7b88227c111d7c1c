"""The paper's trainings: Table 2 (pretraining) and Table 3 (fine-tuning on a task), as specs of the training loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ssmax.errors import UserError
from ssmax.paper.models import switch_at, turn_on
from ssmax.paper.recipes import Recipe
from ssmax.training.checkpoints import owner
from ssmax.training.datasets import Examples, Windows
from ssmax.training.loop import Setup, Spec, Trained, train
from ssmax.training.ranks import world_size

__all__ = ["finetune", "pretrain", "task_examples"]


def pretrain(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Any,
    seed: int,
    folder: Path,
    progress: Callable[[int], Any],
    setup: Setup = Setup(),  # noqa: B008 (frozen)
) -> Trained:
    """Train as in Table 2; checkpoints lie in folder, and the newest whole one there is continued."""
    if setup.shard and world_size() > 1 and hasattr(model, "learned_p"):
        raise UserError("variant p shares one parameter among all layers and cannot be sharded; leave out --shard")
    spec = Spec(
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        step_tokens=recipe.batch_size * recipe.train_length,
        device_batch_size=recipe.device_batch_size,
        learning_rate=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup_steps,
        schedule="constant_with_warmup",
        precision=recipe.precision,
        checkpoint_steps=recipe.checkpoint_steps,
        seed=seed,
        owner=owner(folder, recipe),
    )
    data = Windows(tokens, recipe.train_length, recipe.steps * recipe.batch_size, seed)
    switch = switch_at(recipe)
    return train(model, data, spec, folder, progress, setup, lambda model, step: turn_on(model, step >= switch))


def task_examples(
    draw: Callable[[int, np.random.Generator], Any], shortest: int, recipe: Recipe, steps: int, seed: int
) -> Examples:
    """Return the examples of a fine-tuning, no longer than the training length."""
    size = recipe.finetune_batch_size
    return Examples(draw, shortest, longest=recipe.train_length, batch_size=size, steps=steps, seed=seed)


def finetune(
    model: PreTrainedModel,
    recipe: Recipe,
    examples: Examples,
    folder: Path,
    progress: Callable[[int], Any],
    setup: Setup = Setup(),  # noqa: B008 (frozen)
) -> Trained:
    """Fine-tune on a task as in Table 3; checkpoints as in pretrain."""
    spec = Spec(
        steps=examples.steps,
        batch_size=recipe.finetune_batch_size,
        step_tokens=recipe.finetune_batch_size * recipe.train_length,
        device_batch_size=recipe.device_batch_size,
        learning_rate=recipe.finetune_learning_rate,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        warmup_steps=recipe.finetune_warmup_steps,
        schedule="cosine",
        precision=recipe.precision,
        checkpoint_steps=recipe.checkpoint_steps,
        seed=examples.seed,
        owner=owner(folder, recipe),
    )
    return train(model, examples, spec, folder, progress, setup)
