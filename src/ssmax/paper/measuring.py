"""What is measured of the paper's models: loss by position, retrieval with needle scores, and counting, as rows."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmax.data.corpus import Corpus
from ssmax.evaluation import log_edges, loss_by_position, retrieve, retrieve_grid, rope_theta
from ssmax.evaluation.tasks import depth_grid
from ssmax.paper.recipes import Job, Recipe
from ssmax.paper.stages import COUNT_TRIALS, count_lengths
from ssmax.paper.tasks import count_task, counted, needle_task
from ssmax.paper.training import FINETUNED, load_stage, pretrained
from ssmax.runs.rows import Row

__all__ = ["counting", "position_loss", "retrieval"]

# Tokens that pass at once in an evaluation: bounds its memory.
BATCH_TOKENS = 32_768


def position_loss(job: Job, recipe: Recipe, corpus: Corpus, models: Path, progress: Callable[[int], Any]) -> list[Row]:
    """Measure the loss at each position of held-out texts, under each theta."""
    model = pretrained(job, recipe, models)
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


def retrieval(job: Job, recipe: Recipe, corpus: Corpus, models: Path, progress: Callable[[int], Any]) -> list[Row]:
    """Measure how many needles are found, by context size and depth, and each head's attention on them."""
    model = load_stage(models / job.name / FINETUNED["finetune"], recipe)
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


def counting(job: Job, recipe: Recipe, corpus: Corpus, models: Path, progress: Callable[[int], Any]) -> list[Row]:
    """Measure how many counts are right, by context size."""
    model = load_stage(models / job.name / FINETUNED["count"], recipe)
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
