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
from ssmax.evaluation.retrieval import RetrievalTrial, retrieve_grid
from ssmax.evaluation.tasks import ABCDigits, NeedleTask, depth_grid
from ssmax.runs.rows import Row

__all__ = ["attention_rows", "draw_trials", "loss_rows", "retrieval_rows"]

# Tokens in a batch of the longest prompts; fewer if memory does not suffice.
BATCH_TOKENS = 32_768
QUANTILES = (0.1, 0.5, 0.9)

# The measures of sharpness_by_layer, in its order.
MEASURED = [(metric, sink) for sink in ("with", "without") for metric in ("attention_entropy", "largest_weight")]

Progress = Callable[[int], Any]


def loss_rows(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    *,
    variant: str,
    at: Mapping[str, Any],
    chunk: int = 1024,
    progress: Progress | None = None,
) -> list[Row]:
    """Return rows of loss_by_position (nats per token) for documents (T,) of equal length, in log-spaced bins.

    A row's `at` holds position (the bin's last), from (its first) and, with several documents, low and high: the 95 %
    confidence interval of the mean over documents (Student's t).
    """
    losses = [loss_by_position(model, ids[None], chunk=chunk, progress=progress).cpu() for ids in documents]
    together = torch.cat(losses)
    if not together.isfinite().all():
        first = int((~together.isfinite()).any(0).nonzero()[0]) + 1
        raise FloatingPointError(f"{type(model).__name__} gives a loss that is not finite, from position {first} on")
    rows = []
    for part in binned(together):
        place = {**at, "position": part.last, "from": part.first}
        if part.low is not None:
            place |= {"low": part.low, "high": part.high}
        samples = len(documents) * (part.last - part.first + 1)
        rows.append(Row("loss_by_position", variant, None, place, part.mean, samples))
    return rows


def draw_trials(
    task: NeedleTask | ABCDigits, lengths: Sequence[int], depths: Sequence[float], trials: int, seed: int
) -> list[dict]:
    """Draw the trials of a grid. They depend only on the tokens and the seed, so that models share them."""
    cells = depth_grid(lengths, depths)
    return [task.grid(cells, np.random.default_rng([seed, trial])) for trial in range(trials)]


def retrieval_rows(
    model: PreTrainedModel,
    trials: Sequence[Mapping[tuple[int, float], Any]],
    *,
    variant: str,
    at: Mapping[str, Any],
    chunk: int = 1024,
    progress: Progress | None = None,
) -> list[Row]:
    """Return rows of the accuracy of each cell (length, depth), exact and of the first digit, and of one cell's needle scores.

    needle_score (of each head, mean over trials) and top_needle_score (the highest of each trial) are measured at the
    longest context and the depth nearest to the middle.
    """
    longest = max(length for length, _ in trials[0])
    found: list[Mapping[Any, RetrievalTrial]] = []

    @find_executable_batch_size(starting_batch_size=max(1, min(len(trials), BATCH_TOKENS // longest)))
    def batched(batch_size: int) -> None:
        while len(found) < len(trials):
            part = trials[len(found) : len(found) + batch_size]
            found.extend(retrieve_grid(model, part, chunk=chunk, progress=progress))

    batched()  # pyrefly: ignore: the decorator gives the argument
    rows = []
    for length, depth in trials[0]:
        place = {**at, "length": length, "depth": depth}
        cell = [trial[length, depth] for trial in found]
        for metric, right in (
            ("retrieval_accuracy", [trial.correct for trial in cell]),
            ("first_digit_accuracy", [trial.first_digit for trial in cell]),
        ):
            rows.append(Row(metric, variant, None, place, sum(right) / len(cell), len(cell)))
    return rows + _score_rows(found, longest, variant, at)


def _score_rows(found, longest, variant, at):
    depth = min((depth for length, depth in found[0] if length == longest), key=lambda depth: abs(depth - 0.5))
    cell = [trial[longest, depth] for trial in found]
    if not cell[0].by_layer:
        return []
    place = {**at, "length": longest, "depth": depth}
    rows = []
    for layer in cell[0].by_layer:
        for head, score in enumerate(torch.stack([trial.by_layer[layer] for trial in cell]).mean(0).tolist()):
            rows.append(Row("needle_score", variant, None, {**place, "layer": layer, "head": head}, score, len(cell)))
    for number, trial in enumerate(cell):
        here = {**place, "trial": number, "correct": trial.correct}
        rows.append(
            Row("top_needle_score", variant, None, here, max(of.max().item() for of in trial.by_layer.values()), 1)
        )
    return rows


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

    The metrics are attention_entropy (divided by log n) and largest_weight, with and without the first token ("sink": "with"
    or "without"). Each head's mean over documents is taken; the rows hold the mean and quantiles of these over all heads
    ("heads").
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
