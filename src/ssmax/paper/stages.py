"""The stages of a run, one entry each: the models that take it, its cost, and the function it runs. No torch.

A stage is the unit of resuming: its file of rows is written before the next stage begins.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ssmax.paper.models import VARIANTS

# A text is counted right or wrong as a whole, so counting needs this many times more texts than a cell of the needle grid.
COUNT_TRIALS = 8


@dataclass(frozen=True)
class Stage:
    """A stage of a model. A recipe is a ssmax.paper.recipes.Recipe, a job one of its models.

    Attributes:
        name: its name in file names and rows.
        asked: (recipe, job) -> whether the model takes this stage.
        tokens: recipe -> its work, in tokens of a training step (a token of a forward counts a
            third).
        run: (job, recipe, corpus, folder of models, progress[, setup]) -> rows.
        trains: whether it trains. Then all ranks run it together, it saves when it is stopped, and
            run takes a setup.
    """

    name: str
    asked: Callable[[Any, Any], bool]
    tokens: Callable[[Any], int]
    run: Callable[..., Any]
    trains: bool = False


def _in(option: str) -> Callable[[Any, Any], bool]:
    """Return a test: does an option of the recipe name the job's model?"""
    return lambda recipe, job: job.variant in recipe.letters(option).get(job.form, "")


def _of(place: str) -> Callable[..., Any]:
    """Return a function by the name MODULE:FUNCTION. It is imported when it is called, since that loads torch."""
    module, _, name = place.partition(":")
    return lambda *args: getattr(importlib.import_module(f"ssmax.paper.{module}"), name)(*args)


def count_lengths(recipe: Any) -> list[int]:
    """Return the context sizes of the counting test: half the training length, then those of retrieval."""
    return [recipe.train_length // 2, *recipe.lengths]


def finetune_step_tokens(recipe: Any) -> int:
    """Return the tokens of a step of fine-tuning, whose examples have about half the training length."""
    return recipe.finetune_batch_size * recipe.train_length // 2


def _loss_tokens(recipe):
    return len(recipe.theta_factors) * recipe.loss_texts * recipe.length_factor * recipe.train_length // 3


def _retrieval_tokens(recipe):
    after = sum(1 - depth for depth in recipe.depths)  # cells of a grid share the text before the needle
    grid = len(recipe.needle_factors) * recipe.trials * (max(recipe.lengths) + round(sum(recipe.lengths) * after))
    return (grid + recipe.score_trials * recipe.score_length_factor * recipe.train_length) // 3


STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "pretrain",
            lambda recipe, job: not VARIANTS[job.variant].made_of,
            lambda recipe: recipe.steps * recipe.batch_size * recipe.train_length,
            _of("training:pretrain_stage"),
            trains=True,
        ),
        Stage(
            "position_loss",
            lambda recipe, job: VARIANTS[job.variant].measured,
            _loss_tokens,
            _of("measuring:position_loss"),
        ),
        Stage(
            "finetune",
            _in("retrieval"),
            lambda recipe: recipe.finetune_steps * finetune_step_tokens(recipe),
            partial(_of("training:finetune_stage"), "finetune"),
            trains=True,
        ),
        Stage("retrieval", _in("retrieval"), _retrieval_tokens, _of("measuring:retrieval")),
        Stage(
            "count",
            _in("counting"),
            lambda recipe: recipe.count_steps * finetune_step_tokens(recipe),
            partial(_of("training:finetune_stage"), "count"),
            trains=True,
        ),
        Stage(
            "counting",
            _in("counting"),
            lambda recipe: sum(count_lengths(recipe)) * COUNT_TRIALS * recipe.trials // 3,
            _of("measuring:counting"),
        ),
    )
}
