"""The paper's experiments as stages: each leaves its rows, whole, before the next begins, so that a run can continue."""

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from ssmax.data.corpus import Corpus
from ssmax.errors import Damaged, UserError
from ssmax.evaluation import NeedleTask, log_edges, loss_by_position, retrieve, retrieve_grid, rope_theta
from ssmax.evaluation.tasks import depth_grid
from ssmax.hf import convert
from ssmax.hf.loading import load_model
from ssmax.paper import training
from ssmax.paper.counting import CountTask, counted
from ssmax.paper.models import build_model
from ssmax.paper.recipes import Job, Recipe
from ssmax.runs.files import check_folder, written_whole
from ssmax.runs.rows import Row
from ssmax.scaling import scalable_softmax
from ssmax.training import checkpoints
from ssmax.training.datasets import Windows
from ssmax.training.loop import Setup

__all__ = ["check_fit", "formula_rows", "run_stage", "stage_tokens"]

TRAINED = {"finetune": "finetuned", "count": "counting"}  # folders of fine-tuned models
# Tokens that pass at once in an evaluation: bounds its memory.
BATCH_TOKENS = 32_768


def check_fit(recipe: Recipe, corpus: Corpus) -> None:
    """Raise UserError where the corpus or the training length is too short for the recipe, before anything is trained."""
    Windows(corpus.train, recipe.train_length, 1, seed=0)
    for stage, asked in (("finetune", recipe.retrieval), ("count", recipe.counting)):
        if asked:
            _examples(stage, corpus, recipe, seed=0)
    if recipe.counting and (shortest := count_task(corpus, corpus.train).shortest) > min(count_lengths(recipe)):
        raise UserError(
            f"a text to count in has up to {shortest} tokens in marks and question, and the shortest that is asked about has "
            f"{min(count_lengths(recipe))}, half of the training window; raise --train-length"
        )


def stage_tokens(stage: str, recipe: Recipe) -> int:
    """Return the work of a stage for the progress bar, in tokens of a training step (a forward counts a third)."""
    if stage == "pretrain":
        return recipe.steps * recipe.batch_size * recipe.train_length
    if stage in ("finetune", "count"):
        steps = recipe.finetune_steps if stage == "finetune" else recipe.count_steps
        return steps * recipe.finetune_batch_size * recipe.train_length
    if stage == "position_loss":
        return len(recipe.theta_factors) * recipe.loss_texts * recipe.length_factor * recipe.train_length // 3
    if stage == "counting":
        return sum(count_lengths(recipe)) * COUNT_TRIALS * recipe.trials // 3
    # A grid's cells share the text in front of the needle.
    behind = sum(1 - depth for depth in recipe.depths)
    grid = len(recipe.needle_factors) * recipe.trials * (max(recipe.lengths) + round(sum(recipe.lengths) * behind))
    return (grid + recipe.score_trials * recipe.score_length_factor * recipe.train_length) // 3


def run_stage(
    stage: str,
    job: Job,
    recipe: Recipe,
    corpus: Corpus,
    models: Path,
    progress: Callable[[int], Any],
    setup: Setup = Setup(),  # noqa: B008 (frozen)
) -> list[Row]:
    """Run one stage of one job: read what the stages before it left in the folder models, leave its own, return its rows.

    In a distributed run all ranks call the stages of training together; each returns the rows.
    """
    if stage == "pretrain":
        return _pretrain(job, recipe, corpus, models, progress, setup)
    if stage in ("finetune", "count"):
        return _finetune(stage, job, recipe, corpus, models, progress, setup)
    measure = {"position_loss": _position_loss, "retrieval": _retrieval, "counting": _counting}[stage]
    return measure(job, recipe, corpus, models, progress)


def formula_rows() -> list[Row]:
    """Figures 1 and 3, from the formula alone."""
    rows = []
    for n in (2**k for k in range(1, 18)):
        z = torch.full((n,), -2.0, dtype=torch.float64)
        z[-1] = 3.0
        for variant, weights, s in (("a", z.softmax(0), None), ("b", scalable_softmax(z, 0.43), 0.43)):
            rows.append(Row("max_weight", variant, None, {"n": n, "s": s}, weights[-1].item(), 1))
    for n in (100, 1_000, 10_000, 100_000):
        z = torch.linspace(0, 1, n, dtype=torch.float64)
        for z_max in np.linspace(0, 14, 113):
            z[-1] = float(z_max)
            for variant, s in (("a", None), ("b", 0.43), ("b", 1.0)):
                weights = z.softmax(0) if s is None else scalable_softmax(z, s)
                at = {"n": n, "z_max": round(float(z_max), 3), "s": s}
                rows.append(Row("focus_weight", variant, None, at, weights[-1].item(), 1))
    return rows


def _pretrain(job, recipe, corpus, models, progress, setup):
    folder = models / job.name
    model = build_model(recipe, job.form, job.variant, job.seed, corpus.vocab_size, corpus.end)
    scratch = folder / "pretrain-checkpoints"
    trained = training.pretrain(model, recipe, corpus.train, job.seed, scratch, progress, setup)
    rows = _loss_rows(job, trained.losses, "pretrain")
    if job.variant == "p":
        learned: Any = trained.model.learned_p
        rows += [
            Row("learned_p", "p", job.seed, {"form": job.form, "n": n}, p, 1) for n, p in enumerate(learned.tolist(), 1)
        ]
    else:
        _save(trained.model, folder / "pretrained", recipe)
    _remove(scratch)
    return rows


def _finetune(stage, job, recipe, corpus, models, progress, setup):
    folder = models / job.name
    model = _pretrained(job, recipe, models)
    examples = _examples(stage, corpus, recipe, job.seed)
    scratch = folder / f"{stage}-checkpoints"
    trained = training.finetune(model, recipe, examples, scratch, progress, setup)
    _save(trained.model, folder / TRAINED[stage], recipe)
    _remove(scratch)
    return _loss_rows(job, trained.losses, stage)


def _examples(stage, corpus, recipe, seed):
    if stage == "count":
        task = count_task(corpus, corpus.train)
        return training.task_examples(task.example, task.shortest, recipe, recipe.count_steps, seed)
    needles = needle_task(corpus, recipe, corpus.train)
    draw = partial(_at_any_depth, needles)
    return training.task_examples(draw, needles.shortest, recipe, recipe.finetune_steps, seed)


def _at_any_depth(task, length, rng):
    return task.example(length, rng.random(), rng)


def _position_loss(job, recipe, corpus, models, progress):
    model = _pretrained(job, recipe, models)
    length = recipe.length_factor * recipe.train_length
    texts = torch.from_numpy(corpus.held_out[:, : length + 1].astype(np.int64))
    edges = log_edges(length)
    rows = []
    for factor in recipe.theta_factors:
        with rope_theta(model, factor):
            losses = []
            for batch in texts.split(max(1, BATCH_TOKENS // length)):
                losses.append(loss_by_position(model, batch))
                progress(batch.numel() // 3)
        mean = torch.cat(losses).double().mean(0)
        for first, last in zip([0, *edges], edges, strict=False):
            at = {"form": job.form, "position": last, "from": first + 1, "theta_factor": factor}
            value, samples = mean[first:last].mean().item(), len(texts) * (last - first)
            rows.append(Row("loss_by_position", job.variant, job.seed, at, value, samples))
        if factor == max(recipe.theta_factors):
            rows += _text_rows(job, recipe, torch.cat(losses), factor)
    return rows


def _text_rows(job, recipe, losses, factor):
    """Each text's own loss in wide spans of positions, for a bootstrap over texts; at the largest theta alone."""
    short, length = recipe.train_length, losses.shape[1]
    edges = [0, *(short * k for k in (1, 8, 16) if short * k < length), length]
    rows = []
    for first, last in itertools.pairwise(edges):
        for text, value in enumerate(losses[:, first:last].double().mean(1).tolist()):
            at = {"form": job.form, "position": last, "from": first + 1, "theta_factor": factor, "text": text}
            rows.append(Row("text_loss", job.variant, job.seed, at, value, last - first))
    return rows


def _retrieval(job, recipe, corpus, models, progress):
    model = _load(models / job.name / TRAINED["finetune"], recipe)
    task = needle_task(corpus, recipe, corpus.held_out.reshape(-1))
    factor = max(recipe.needle_factors)
    # Whether a model has learned the task shows under the theta of its training, at the length of its training.
    rows = [] if factor == 1 else _accuracies(model, job, recipe, task, 1, [recipe.train_length], progress)
    for raised in recipe.needle_factors:
        rows += _accuracies(model, job, recipe, task, raised, recipe.lengths, progress)
    with rope_theta(model, factor):
        length = recipe.score_length_factor * recipe.train_length
        trials = _trials(model, task, length, 0.5, recipe.score_trials, progress)
    at = {"form": job.form, "length": length, "depth": 0.5, "theta_factor": factor}
    mean = torch.stack([trial.scores for trial in trials]).mean(0)
    for layer, heads in enumerate(mean.tolist()):
        for head, score in enumerate(heads):
            place = {**at, "layer": layer, "head": head}
            rows.append(Row("needle_score", job.variant, job.seed, place, score, len(trials)))
    for number, trial in enumerate(trials):
        place = {**at, "trial": number, "correct": trial.correct}
        rows.append(Row("top_needle_score", job.variant, job.seed, place, trial.scores.max().item(), 1))
    return rows


def _accuracies(model, job, recipe, task, factor, lengths, progress):
    """Rows of each length and depth. A trial's cells share their text, of which each part is read once; all models get the same."""
    cells = depth_grid(lengths, recipe.depths)
    trials = [task.grid(cells, np.random.default_rng([trial, 2])) for trial in range(recipe.trials)]
    batch, found = max(1, BATCH_TOKENS // max(lengths)), []
    with rope_theta(model, factor):
        for first in range(0, len(trials), batch):
            found += retrieve_grid(model, trials[first : first + batch], progress=lambda done: progress(done // 3))
    rows = []
    for length, depth in cells:
        at = {"form": job.form, "length": length, "depth": depth, "theta_factor": factor}
        accuracy = sum(trial[length, depth].correct for trial in found) / len(found)
        rows.append(Row("retrieval_accuracy", job.variant, job.seed, at, accuracy, len(found)))
    return rows


# Counting is right or wrong a text, so that it takes more of them than a needle grid has in a cell.
COUNT_TRIALS = 8


def _counting(job, recipe, corpus, models, progress):
    model = _load(models / job.name / TRAINED["count"], recipe)
    task = count_task(corpus, corpus.held_out.reshape(-1))
    # Counting depends on positions so much that nothing is left of it under a theta that was not trained.
    factor = min(recipe.theta_factors)
    rows = []
    with rope_theta(model, factor):
        for length in count_lengths(recipe):
            rng = np.random.default_rng([length, 1])
            right, count, batch = 0, COUNT_TRIALS * recipe.trials, max(1, BATCH_TOKENS // length)
            for first in range(0, count, batch):
                examples = [task.example(length, rng) for _ in range(min(batch, count - first))]
                right += sum(counted(model, examples))
                progress(length * len(examples) // 3)
            at = {"form": job.form, "length": length, "theta_factor": factor}
            rows.append(Row("counting_accuracy", job.variant, job.seed, at, right / count, count))
    return rows


def count_lengths(recipe: Recipe) -> list[int]:
    """Context sizes of the counting test: from half of the training length."""
    return [recipe.train_length // 2, *recipe.lengths]


def count_task(corpus: Corpus, haystack: Any) -> CountTask:
    """Return the counting task in tokens of the corpus, or raise UserError where a number is not one token."""
    split = [count for count in range(10) if len(corpus.encode(f" {count}")) != 1]
    if split:
        raise UserError(
            f"the tokenizer makes more than one token of ' {split[0]}', and counting asks for numbers of one token; leave "
            "counting out with an empty --counting, or give another --tokenizer"
        )
    return CountTask(corpus.encode, haystack)


def needle_task(corpus: Corpus, recipe: Recipe, haystack: Any) -> NeedleTask:
    """Return the needle task in tokens of the corpus."""
    return NeedleTask(corpus.encode, haystack, recipe.needle_digits)


def _trials(model, task, length, depth, count, progress):
    # The same examples for every model: the variants are compared on the same questions.
    rng = np.random.default_rng([length, round(depth * 1000)])
    examples = [task.example(length, depth, rng) for _ in range(count)]
    trials, batch = [], max(1, BATCH_TOKENS // length)
    for start in range(0, count, batch):
        # With digits that share tokens numbers differ in length; those of one length are asked together.
        for size in sorted({len(example.answer) for example in examples[start : start + batch]}):
            same = [example for example in examples[start : start + batch] if len(example.answer) == size]
            trials += retrieve(model, same)
        progress(length * len(examples[start : start + batch]) // 3)
    return trials


def _loss_rows(job, losses, stage):
    return [
        Row("train_loss", job.variant, job.seed, {"form": job.form, "stage": stage, "step": step}, loss, 1)
        for step, loss in losses
    ]


def _save(model: PreTrainedModel, folder: Path, recipe: Recipe) -> None:
    if PartialState().is_main_process:
        with written_whole(folder, checkpoints.owner(folder, recipe)) as temporary:
            model.save_pretrained(temporary)


def _remove(scratch: Path) -> None:
    if PartialState().is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)


def _pretrained(job: Job, recipe: Recipe, models: Path) -> PreTrainedModel:
    """(e) is (a) of the same seed, switched after its pretraining."""
    if job.variant != "e":
        return _load(models / job.name / "pretrained", recipe)
    softmax = dataclasses.replace(job, variant="a")
    return convert(_load(models / softmax.name / "pretrained", recipe), "matched")


def _load(folder: Path, recipe: Recipe) -> PreTrainedModel:
    try:
        check_folder(folder, checkpoints.owner(folder, recipe))
    except Damaged as error:
        name = folder.parent.name
        raise UserError(f"{error}; delete models/{name} and stages/{name}.* to train that model anew") from error
    model: Any = load_model(folder, attn_implementation="sdpa", local_files_only=True)
    return model.to(PartialState().device)
