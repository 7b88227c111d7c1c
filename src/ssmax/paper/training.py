"""The paper's trainings: Table 2 (pretraining) and Table 3 (fine-tuning on a task), and the stages that run them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel

from ssmax.conversion import convert, revert
from ssmax.data.corpus import Corpus
from ssmax.errors import Damaged, UserError
from ssmax.hf.loading import load_model
from ssmax.paper.building import build_model, set_switches, switch_at
from ssmax.paper.models import VARIANTS
from ssmax.paper.recipes import Job, Recipe
from ssmax.paper.stages import count_lengths, finetune_step_tokens
from ssmax.paper.tasks import count_task, needle_task
from ssmax.query_scale import QueryScale
from ssmax.runs.files import check_folder, written_whole
from ssmax.runs.rows import Row
from ssmax.training.checkpoints import owner
from ssmax.training.datasets import Examples, Windows
from ssmax.training.loop import Branch, Setup, Spec, Trained, train
from ssmax.training.ranks import world_size

SCRATCH = "pretrain-checkpoints"
SWITCHABLE = "switchable"  # a file there: the checkpoints are those of a model that could switch
FINETUNED = {"finetune": "finetuned", "count": "counting"}  # folders of fine-tuned models


def pretrain(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Any,
    seed: int,
    folder: Path,
    progress: Callable[[int], Any],
    setup: Setup = Setup(),  # noqa: B008 (frozen)
    branch: Branch | None = None,
) -> Trained:
    """Train a model as in Table 2; arguments and errors as in ssmax.training.loop.train.

    With a branch, the model must have switches, which stay off here; the branch switches.
    """
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
        branch=branch,
    )
    data = Windows(tokens, recipe.train_length, recipe.steps * recipe.batch_size, seed)
    switch = recipe.steps if branch else switch_at(recipe)
    return train(model, data, spec, folder, progress, setup, lambda model, step: set_switches(model, step >= switch))


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
    """Fine-tune a model on a task as in Table 3; arguments and errors as in pretrain."""
    spec = Spec(
        steps=examples.steps,
        batch_size=recipe.finetune_batch_size,
        step_tokens=finetune_step_tokens(recipe),
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


def check_fit(recipe: Recipe, corpus: Corpus) -> None:
    """Raise UserError if the corpus or the training length is too short for the recipe. Call it before training."""
    Windows(corpus.train, recipe.train_length, 1, seed=0)
    for stage, asked in (("finetune", recipe.retrieval), ("count", recipe.counting)):
        if asked:
            stage_examples(stage, corpus, recipe, seed=0)
    if recipe.counting and (shortest := count_task(corpus, corpus.train).shortest) > min(count_lengths(recipe)):
        raise UserError(
            f"a text to count in has up to {shortest} tokens in marks and question, but the shortest context has "
            f"{min(count_lengths(recipe))}, half of the training window; raise --train-length"
        )


def pretrain_stage(
    job: Job,
    recipe: Recipe,
    corpus: Corpus,
    models: Path,
    progress: Callable[[int], Any],
    setup: Setup = Setup(),  # noqa: B008 (frozen)
) -> list[Row]:
    """Pretrain a model from its seed, save it if it will be measured, and return rows of its training loss and of what its scales learned."""
    folder = models / job.name
    scratch = folder / SCRATCH
    branch = _branch(job, recipe, models)
    if branch and PartialState().is_main_process:
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / SWITCHABLE).touch()
    variant = branch[0].variant if branch else job.variant
    model = build_model(recipe, job.form, variant, job.seed, corpus.vocab_size, corpus.end)
    trained = pretrain(model, recipe, corpus.train, job.seed, scratch, progress, setup, branch and branch[1])
    if branch:
        revert(trained.model)
    rows = _loss_rows(job, trained.losses, "pretrain")
    if not VARIANTS[job.variant].measured:
        learned: Any = trained.model.learned_p
        rows += [
            Row("learned_p", "p", job.seed, {"form": job.form, "n": n}, p, 1) for n, p in enumerate(learned.tolist(), 1)
        ]
    else:
        rows += _scale_rows(job, trained.model)
        save_stage(trained.model, folder / "pretrained", recipe)
    _remove(scratch)
    return rows


def _branch(job, recipe, models):
    """Return the job that shares this job's training until it switches, and its Branch; None if the run trains none.

    A training goes on as it began: a checkpoint of a model that cannot switch does not fit one that
    can, nor the reverse.
    """
    scratch = models / job.name / SCRATCH
    switchable = (scratch / SWITCHABLE).exists()
    if any(scratch.glob("checkpoint-*")) and not switchable:
        return None
    jobs = [other for other in recipe.jobs if other == replace(job, variant=other.variant)]
    for other in jobs:
        trained = (models / other.name / "pretrained").exists()
        if VARIANTS[other.variant].branch_of == job.variant and (switchable or not trained):
            folder = models / other.name / SCRATCH
            return other, Branch(switch_at(recipe), folder, owner(folder, recipe))
    return None


def _scale_rows(job, model):
    """Return rows of what each head's scale has learned, and of the number of parameters of all scales."""
    scales = [module for module in model.modules() if isinstance(module, QueryScale)]
    count = sum(parameter.numel() for scale in scales for parameter in scale.parameters())
    rows = [Row("scale_parameters", job.variant, job.seed, {"form": job.form}, count, 1)] if scales else []
    for layer, scale in enumerate(scales):
        for name, values in scale.learned.items():
            for head, value in enumerate(values.tolist()):
                at = {"form": job.form, "layer": layer, "head": head, "name": name}
                rows.append(Row("learned_scale", job.variant, job.seed, at, value, 1))
    return rows


def finetune_stage(
    stage: str,
    job: Job,
    recipe: Recipe,
    corpus: Corpus,
    models: Path,
    progress: Callable[[int], Any],
    setup: Setup = Setup(),  # noqa: B008 (frozen)
) -> list[Row]:
    """Fine-tune a model on the task of a stage, save it, and return rows of its training loss."""
    folder = models / job.name
    model = pretrained(job, recipe, models)
    examples = stage_examples(stage, corpus, recipe, job.seed)
    scratch = folder / f"{stage}-checkpoints"
    trained = finetune(model, recipe, examples, scratch, progress, setup)
    save_stage(trained.model, folder / FINETUNED[stage], recipe)
    _remove(scratch)
    return _loss_rows(job, trained.losses, stage)


def stage_examples(stage: str, corpus: Corpus, recipe: Recipe, seed: int) -> Examples:
    """Return the examples of a stage of fine-tuning."""
    if stage == "count":
        task = count_task(corpus, corpus.train)
        return task_examples(task.example, task.shortest, recipe, recipe.count_steps, seed)
    needles = needle_task(corpus, recipe, corpus.train)
    draw = partial(at_any_depth, needles)
    return task_examples(draw, needles.shortest, recipe, recipe.finetune_steps, seed)


def at_any_depth(task: Any, length: int, rng: np.random.Generator) -> Any:
    """Return an example of a task of needles, of that length and at a random depth."""
    depth = rng.random()
    return task.grid([(length, depth)], rng)[length, depth]


def _loss_rows(job, losses, stage):
    return [
        Row("train_loss", job.variant, job.seed, {"form": job.form, "stage": stage, "step": step}, loss, 1)
        for step, loss in losses
    ]


def save_stage(model: PreTrainedModel, folder: Path, recipe: Recipe) -> None:
    """Save a model in a folder inside its own, whole or not at all, with a seal."""
    if PartialState().is_main_process:
        with written_whole(folder, owner(folder, recipe)) as temporary:
            model.save_pretrained(temporary)


def _remove(scratch: Path) -> None:
    if PartialState().is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)


def pretrained(job: Job, recipe: Recipe, models: Path) -> PreTrainedModel:
    """Return a job's pretrained model. A variant that is made of another one is converted, without further training."""
    variant = VARIANTS[job.variant]
    if not variant.made_of:
        return load_stage(models / job.name / "pretrained", recipe)
    source = models / replace(job, variant=variant.made_of).name / "pretrained"
    return convert(load_stage(source, recipe), "matched", **(variant.conversion(recipe) or {}))


def check_stage(folder: Path, recipe: Recipe, stages: str = "*") -> None:
    """Raise UserError if a model that save_stage saved is incomplete or damaged, or belongs to another run."""
    try:
        check_folder(folder, owner(folder, recipe))
    except Damaged as error:
        name = folder.parent.name
        raise UserError(
            f"{error}; delete models/{name} and stages/{name}.{stages} to train that model again"
        ) from error


def load_stage(folder: Path, recipe: Recipe) -> PreTrainedModel:
    """Load a model that save_stage saved. It raises as check_stage does."""
    check_stage(folder, recipe)
    model: Any = load_model(folder, attn_implementation="sdpa", local_files_only=True)
    return model.to(PartialState().device)
