"""The paper's experiments as stages: each leaves its rows, whole, before the next begins, so that a run can continue."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import ssmax.hf  # noqa: F401  (registers the saved models)
from ssmax.evaluation import NeedleTask, loss_by_position, retrieve, rope_theta
from ssmax.lab import training
from ssmax.lab.corpus import Corpus
from ssmax.lab.recipes import Job, Recipe
from ssmax.results import Row
from ssmax.scaling import scalable_softmax

__all__ = ["check_fit", "formula_rows", "run_stage", "stage_tokens"]

# Tokens that pass at once in an evaluation: bounds its memory.
BATCH_TOKENS = 32_768


def check_fit(recipe: Recipe, corpus: Corpus) -> None:
    """Raise UserError where the corpus or the training length is too short for the recipe, before anything is trained."""
    training.Windows(corpus.train, recipe.train_length, 1, seed=0)
    training.Examples(needle_task(corpus, recipe, corpus.train), recipe, seed=0)


def stage_tokens(stage: str, recipe: Recipe) -> int:
    """Return the work of a stage for the progress bar, in tokens of a training step (a forward counts a third)."""
    if stage == "pretrain":
        return recipe.steps * recipe.batch_size * recipe.train_length
    if stage == "finetune":
        return recipe.finetune_steps * recipe.finetune_batch_size * recipe.train_length
    if stage == "position_loss":
        return len(recipe.theta_factors) * recipe.loss_texts * recipe.length_factor * recipe.train_length // 3
    cells = sum(recipe.lengths) * len(recipe.depths) * recipe.trials
    return (cells + recipe.score_trials * recipe.score_length_factor * recipe.train_length) // 3


def run_stage(
    stage: str, job: Job, recipe: Recipe, corpus: Corpus, folder: Path, progress: Callable[[int], None]
) -> list[Row]:
    """Run one stage of one job: read what the stages before it left in folder, leave its own, and return its rows."""
    run = {"pretrain": _pretrain, "position_loss": _position_loss, "finetune": _finetune, "retrieval": _retrieval}
    return run[stage](job, recipe, corpus, folder, progress)


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


def _pretrain(job, recipe, corpus, folder, progress):
    model = training.build_model(recipe, job.form, job.variant, job.seed, corpus.tokenizer.get_vocab_size())
    losses = training.pretrain(model, recipe, corpus.train, job.seed, folder / "scratch", progress)
    _save(model, folder / "pretrained")
    return _loss_rows(job, losses, "pretrain")


def _finetune(job, recipe, corpus, folder, progress):
    model = _load(folder / "pretrained")
    task = needle_task(corpus, recipe, corpus.train)
    losses = training.finetune(model, recipe, task, job.seed, folder / "scratch", progress)
    _save(model, folder / "finetuned")
    return _loss_rows(job, losses, "finetune")


def _position_loss(job, recipe, corpus, folder, progress):
    model = _load(folder / "pretrained")
    length = recipe.length_factor * recipe.train_length
    texts = torch.from_numpy(corpus.held_out[:, : length + 1].astype(np.int64))
    edges = sorted({round(8 * 2 ** (k / 2)) for k in range(64) if 8 * 2 ** (k / 2) < length} | {length})
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
    return rows


def _retrieval(job, recipe, corpus, folder, progress):
    model = _load(folder / "finetuned")
    task = needle_task(corpus, recipe, corpus.held_out.reshape(-1))
    factor = max(recipe.theta_factors)
    rows = []
    with rope_theta(model, factor):
        for length in recipe.lengths:
            for depth in recipe.depths:
                trials = _trials(model, task, length, depth, recipe.trials, progress)
                at = {"form": job.form, "length": length, "depth": depth, "theta_factor": factor}
                accuracy = sum(trial.correct for trial in trials) / len(trials)
                rows.append(Row("retrieval_accuracy", job.variant, job.seed, at, accuracy, len(trials)))
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


def needle_task(corpus: Corpus, recipe: Recipe, haystack: np.ndarray) -> NeedleTask:
    """Return the needle task in tokens of the corpus."""
    return NeedleTask(lambda text: corpus.tokenizer.encode(text).ids, haystack, recipe.needle_digits)


def _trials(model, task, length, depth, count, progress):
    # The same examples for every model: the variants are compared on the same questions.
    rng = np.random.default_rng([length, round(depth * 1000)])
    examples = [task.example(length, depth, rng) for _ in range(count)]
    trials, batch = [], max(1, BATCH_TOKENS // length)
    for start in range(0, count, batch):
        trials += retrieve(model, examples[start : start + batch])
        progress(length * len(examples[start : start + batch]) // 3)
    return trials


def _loss_rows(job, losses, stage):
    return [
        Row("train_loss", job.variant, job.seed, {"form": job.form, "stage": stage, "step": step}, loss, 1)
        for step, loss in losses
    ]


def _save(model: PreTrainedModel, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(temporary)
    temporary.rename(folder)


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
