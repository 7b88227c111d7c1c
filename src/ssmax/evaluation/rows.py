"""The measurements of ssmax evaluate and ssmax reproduce as rows, one function each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor
from transformers import PreTrainedModel

from ssmax.evaluation.attention import sharpness_by_layer
from ssmax.evaluation.position_loss import binned, loss_by_position
from ssmax.evaluation.retrieval import CHUNK, RetrievalTrial, retrieve_grid
from ssmax.evaluation.tasks import ABCDigits, Cell, NeedleTask, depth_grid
from ssmax.runs.rows import Row

# Tokens in a batch of the longest prompts; fewer if memory does not suffice.
BATCH_TOKENS = 32_768
QUANTILES = (0.1, 0.5, 0.9)

# The measures of sharpness_by_layer, in its order.
MEASURED = [(metric, sink) for sink in ("with", "without") for metric in ("attention_entropy", "largest_weight")]

# What makes an answer right.
RIGHT: dict[str, Callable[[RetrievalTrial], bool]] = {
    "retrieval_accuracy": lambda trial: trial.correct,
    "first_digit_accuracy": lambda trial: trial.first_digit,
}

Progress = Callable[[int], Any]


def document_losses(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    *,
    chunk: int = 1024,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Tensor:
    """Return the loss_by_position of documents (T,) of equal length as (documents, T - 1), batch_size at once.

    Raises:
        FloatingPointError: losses that are not finite.
    """
    batches = torch.stack(list(documents)).split(batch_size)
    losses = torch.cat([loss_by_position(model, ids, chunk=chunk, progress=progress).cpu() for ids in batches])
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).any(0).nonzero()[0]) + 1
        raise FloatingPointError(f"{type(model).__name__} gives a loss that is not finite, from position {first} on")
    return losses


def loss_rows(
    losses: Tensor, *, variant: str, at: Mapping[str, Any], seed: int | None = None, band: bool = True
) -> list[Row]:
    """Return rows of loss_by_position (nats per token) in log-spaced bins, from losses (documents, positions).

    A row's `at` holds position (the bin's last), from (its first) and, with a band and several
    documents, low and high: the 95 % confidence interval of the mean over documents (Student's t).
    """
    rows = []
    for part in binned(losses):
        place = {**at, "position": part.last, "from": part.first}
        if band and part.low is not None:
            place |= {"low": part.low, "high": part.high}
        samples = len(losses) * (part.last - part.first + 1)
        rows.append(Row("loss_by_position", variant, seed, place, part.mean, samples))
    return rows


def draw_trials(
    task: NeedleTask | ABCDigits, lengths: Sequence[int], depths: Sequence[float], trials: int, seed: int
) -> list[dict]:
    """Draw the trials of a grid. They depend only on the tokens and the seed, so that models share them."""
    cells = depth_grid(lengths, depths)
    return [task.grid(cells, np.random.default_rng([seed, trial])) for trial in range(trials)]


def grid_results(
    model: PreTrainedModel,
    trials: Sequence[Mapping[Cell, Any]],
    *,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> list[Mapping[Cell, RetrievalTrial]]:
    """Return retrieve_grid of the trials, as many at once as memory allows."""
    longest = max(length for length, _ in trials[0])
    found: list[Mapping[Cell, RetrievalTrial]] = []

    @find_executable_batch_size(starting_batch_size=max(1, min(len(trials), BATCH_TOKENS // longest)))
    def batched(batch_size: int) -> None:
        while len(found) < len(trials):
            part = trials[len(found) : len(found) + batch_size]
            found.extend(retrieve_grid(model, part, chunk=chunk, progress=progress))

    batched()  # pyrefly: ignore: the decorator gives the argument
    return [{cell: trial[cell] for cell in trials[0]} for trial in found]


def accuracy_rows(
    found: Sequence[Mapping[Cell, RetrievalTrial]],
    *,
    variant: str,
    at: Mapping[str, Any],
    seed: int | None = None,
    metrics: Sequence[str] = tuple(RIGHT),
) -> list[Row]:
    """Return rows of the accuracy of each cell (length, depth): of the whole answer and of its first digit."""
    rows = []
    for length, depth in found[0]:
        place = {**at, "length": length, "depth": depth}
        for metric in metrics:
            right = sum(RIGHT[metric](trial[length, depth]) for trial in found)
            rows.append(Row(metric, variant, seed, place, right / len(found), len(found)))
    return rows


def score_rows(
    cell: Sequence[RetrievalTrial], *, variant: str, at: Mapping[str, Any], seed: int | None = None
) -> list[Row]:
    """Return rows of needle_score (of each head, mean over trials) and top_needle_score (the highest of each trial)."""
    rows = []
    for layer in cell[0].by_layer:
        for head, score in enumerate(torch.stack([trial.by_layer[layer] for trial in cell]).mean(0).tolist()):
            rows.append(Row("needle_score", variant, seed, {**at, "layer": layer, "head": head}, score, len(cell)))
    for number, trial in enumerate(cell if cell[0].by_layer else ()):
        place = {**at, "trial": number, "correct": trial.correct}
        top = max(scores.max().item() for scores in trial.by_layer.values())
        rows.append(Row("top_needle_score", variant, seed, place, top, 1))
    return rows


def retrieval_rows(
    model: PreTrainedModel,
    trials: Sequence[Mapping[Cell, Any]],
    *,
    variant: str,
    at: Mapping[str, Any],
    chunk: int = 1024,
    progress: Progress | None = None,
) -> list[Row]:
    """Return accuracy_rows of all cells, and score_rows of the longest context at the depth nearest to the middle."""
    found = grid_results(model, trials, chunk=chunk, progress=progress)
    length = max(length for length, _ in found[0])
    depth = min((depth for size, depth in found[0] if size == length), key=lambda depth: abs(depth - 0.5))
    place = {**at, "length": length, "depth": depth}
    scores = score_rows([trial[length, depth] for trial in found], variant=variant, at=place)
    return accuracy_rows(found, variant=variant, at=at) + scores


def attention_rows(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    *,
    variant: str,
    at: Mapping[str, Any],
    chunk: int = 1024,
    progress: Progress | None = None,
) -> list[Row]:
    """Return rows that say how sharply the heads attend after n tokens of documents (T,), for n = 64, 128, ... and T.

    The metrics are attention_entropy (divided by log n) and largest_weight, with and without the
    first token ("sink": "with" or "without"). Each head's mean over documents is taken; the rows
    hold the mean and quantiles of these over all heads ("heads").
    """
    longest = len(documents[0])
    lengths = sorted({2**k for k in range(6, 40) if 2**k < longest} | {longest})
    found = []
    for ids in documents:
        found.append(sharpness_by_layer(model, ids, lengths, chunk=chunk))
        if progress is not None:
            progress(len(ids))
    rows = []
    for index, n in enumerate(lengths):
        # Over all heads of all layers: the four measures, (heads,) each.
        here = [[torch.cat(of) for of in zip(*by_layer[index][1].values(), strict=True)] for by_layer in found]
        for (metric, sink), tensors in zip(MEASURED, zip(*here, strict=True), strict=True):
            heads = torch.stack(tensors).mean(0).double()
            values = {"mean": heads.mean().item()} | {f"{q:.0%}": heads.quantile(q).item() for q in QUANTILES}
            for name, value in values.items():
                place = {**at, "n": n, "sink": sink, "heads": name}
                rows.append(Row(metric, variant, None, place, value, len(documents) * heads.numel()))
    return rows
