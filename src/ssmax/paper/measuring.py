"""The measurements of the paper's models as rows: loss by position, retrieval with needle scores, and counting."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmax.data.corpus import Corpus
from ssmax.evaluation import rope_scaling, rope_theta
from ssmax.evaluation.rows import accuracy_rows, document_losses, grid_results, loss_rows, score_rows
from ssmax.evaluation.tasks import depth_grid
from ssmax.paper.recipes import Job, Recipe
from ssmax.paper.stages import COUNT_TRIALS, count_lengths
from ssmax.paper.tasks import count_task, counted, needle_task
from ssmax.paper.training import FINETUNED, load_stage, pretrained
from ssmax.runs.rows import Row

# Tokens in a forward pass of an evaluation, which limits its memory.
BATCH_TOKENS = 32_768
# Llama 3.1's values: frequencies with less than one turn within the training length are divided, those with four or more kept.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def position_loss(job: Job, recipe: Recipe, corpus: Corpus, models: Path, progress: Callable[[int], Any]) -> list[Row]:
    """Return rows of the loss at each position of held-out texts, under each theta."""
    model = pretrained(job, recipe, models)
    length = recipe.length_factor * recipe.train_length
    texts = torch.from_numpy(corpus.held_out[:, : length + 1].astype(np.int64))
    rows = []
    for factor in recipe.theta_factors:
        with rope_theta(model, factor):
            batch = max(1, BATCH_TOKENS // length)
            losses = document_losses(model, list(texts), batch_size=batch, progress=lambda done: progress(done // 3))
        at = {"form": job.form, "theta_factor": factor}
        rows += loss_rows(losses, variant=job.variant, seed=job.seed, at=at, band=False)
        if factor == max(recipe.theta_factors):
            rows += _text_rows(job, recipe, losses, factor)
    return rows


def _text_rows(job, recipe, losses, factor):
    """Return rows of each text's own loss in wide spans of positions, for a bootstrap over texts."""
    short, length = recipe.train_length, losses.shape[1]
    edges = [0, *(short * k for k in (1, 8, 16) if short * k < length), length]
    rows = []
    for first, last in itertools.pairwise(edges):
        for text, value in enumerate(losses[:, first:last].double().mean(1).tolist()):
            at = {"form": job.form, "position": last, "from": first + 1, "theta_factor": factor, "text": text}
            rows.append(Row("text_loss", job.variant, job.seed, at, value, last - first))
    return rows


def retrieval(job: Job, recipe: Recipe, corpus: Corpus, models: Path, progress: Callable[[int], Any]) -> list[Row]:
    """Return rows of the share of needles found, by context size and depth, and of each head's attention on them."""
    model = load_stage(models / job.name / FINETUNED["finetune"], recipe)
    task = needle_task(corpus, recipe, corpus.held_out.reshape(-1))
    factor = max(recipe.needle_factors)
    # Whether a model has learned the task is measured at the training length, with the RoPE of training.
    rows = [] if factor == 1 else _accuracies(model, job, recipe, task, 1, [recipe.train_length], progress)
    for raised in recipe.needle_factors:
        rows += _accuracies(model, job, recipe, task, raised, recipe.lengths, progress)
    length, depth = recipe.score_length_factor * recipe.train_length, 0.5
    # The same examples for every model: the variants are compared on the same questions.
    rng = np.random.default_rng([length, round(depth * 1000)])
    examples = [{(length, depth): task.example(length, depth, rng)} for _ in range(recipe.score_trials)]
    with _stretched(model, recipe, factor):
        found = grid_results(model, examples, progress=lambda done: progress(done // 3))
    at = {"form": job.form, "length": length, "depth": depth, **_rope(recipe, factor)}
    trials = [trial[length, depth] for trial in found]
    return rows + score_rows(trials, variant=job.variant, seed=job.seed, at=at)


def _accuracies(model, job, recipe, task, factor, lengths, progress):
    """Return rows of the accuracy at each length and depth. Cells of a trial share their text; all models get the same trials."""
    cells = depth_grid(lengths, recipe.depths)
    trials = [task.grid(cells, np.random.default_rng([trial, 2])) for trial in range(recipe.trials)]
    with _stretched(model, recipe, factor):
        found = grid_results(model, trials, progress=lambda done: progress(done // 3))
    at = {"form": job.form, **_rope(recipe, factor)}
    return accuracy_rows(found, variant=job.variant, seed=job.seed, at=at, metrics=["retrieval_accuracy"])


def _stretched(model, recipe, factor):
    """Return a context in which a model reads needles: with its own RoPE (factor 1), or as the recipe stretches it."""
    if factor == 1 or recipe.needle_rope == "theta":
        return rope_theta(model, factor)
    return rope_scaling(model, {"rope_type": "llama3", "factor": float(factor), **LLAMA3})


def _rope(recipe, factor):
    """Return the coordinates of _stretched in rows. For "theta" they are those of earlier versions."""
    return {"theta_factor": factor} | (
        {} if factor == 1 or recipe.needle_rope == "theta" else {"rope": recipe.needle_rope}
    )


def counting(job: Job, recipe: Recipe, corpus: Corpus, models: Path, progress: Callable[[int], Any]) -> list[Row]:
    """Return rows of the share of right counts, by context size."""
    model = load_stage(models / job.name / FINETUNED["count"], recipe)
    task = count_task(corpus, corpus.held_out.reshape(-1))
    rows = []
    for length in count_lengths(recipe):
        rng = np.random.default_rng([length, 1])
        right, count, batch = 0, COUNT_TRIALS * recipe.trials, max(1, BATCH_TOKENS // length)
        for first in range(0, count, batch):
            examples = [task.example(length, rng) for _ in range(min(batch, count - first))]
            right += sum(counted(model, examples))
            progress(length * len(examples) // 3)
        # Counting depends so much on positions that models lose it under another RoPE than that of training.
        at = {"form": job.form, "length": length, "theta_factor": 1}
        rows.append(Row("counting_accuracy", job.variant, job.seed, at, right / count, count))
    return rows
