"""Loss at each position of long texts (the paper's Figure 5). Memory does not grow with length x vocabulary."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ssmax.evaluation.reading import Reader, eval_mode
from ssmax.plots.statistics import t_quantile

# Rows of logits that exist at once: 50 MB for a vocabulary of 50,000.
LOGIT_ROWS = 256


@torch.inference_mode()
def loss_by_position(
    model: PreTrainedModel, token_ids: Tensor, *, chunk: int = 1024, progress: Callable[[int], Any] | None = None
) -> Tensor:
    """Return the loss of each token given all tokens before it.

    Entry t is -log p(token t+1 | tokens 0..t), in nats. The text is read in chunks through a
    key-value cache, and the projection to the vocabulary (with softcap and scaling, if the model
    has them) in slices of a chunk: neither length x vocabulary nor chunk x vocabulary is in memory.
    A model that does not continue exactly from a cache reads the text at once.

    Args:
        model: a causal language model of transformers; it is evaluated in eval mode.
        token_ids: (B, T) integers, without padding.
        chunk: positions in each forward pass. Fewer need less memory.
        progress: called after each chunk with its number of tokens.

    Returns:
        (B, T - 1), float32.

    Raises:
        ValueError: token_ids are not (B, T) integers with T >= 2, chunk is below 1, or the model is
            not causal.

    Example:
        >>> losses = ssmax.evaluation.loss_by_position(model, token_ids)  # token_ids (2, 4096)
        >>> losses.mean(0)  # (4095,): mean over the texts
    """
    if token_ids.ndim != 2 or token_ids.is_floating_point() or token_ids.shape[1] < 2:
        raise ValueError(f"token_ids must be integers (B, T), T >= 2; got {token_ids.dtype} {tuple(token_ids.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    with eval_mode(model):
        reader = Reader(model, token_ids[:, :-1], chunk)
        token_ids = token_ids.to(model.device)
        inputs, targets = token_ids[:, :-1], token_ids[:, 1:]
        if reader.backbone is None:
            chunk = min(chunk, LOGIT_ROWS)
        whole = inputs.shape[1] <= chunk or not reader.pieces
        cache, losses = reader.fresh_if_needed() if whole else reader.fresh_cache(), []
        if whole:
            chunk = inputs.shape[1]
        for rows, wanted in zip(inputs.split(chunk, 1), targets.split(chunk, 1), strict=True):
            losses.append(_losses(reader, rows, wanted, cache))
            if progress is not None:
                progress(rows.numel())
    return torch.cat(losses, 1)


def _losses(reader, rows, wanted, cache):
    if reader.backbone is None:
        return _cross_entropy(reader.call(rows, cache).logits, wanted)
    output = reader.run(rows, cache)
    states, losses = output.last_hidden_state.flatten(0, 1), []
    for slice_RD, wanted_R in zip(states.split(LOGIT_ROWS), wanted.flatten().split(LOGIT_ROWS), strict=True):
        losses.append(_cross_entropy(reader.logits(output, slice_RD[None]), wanted_R[None])[0])
    return torch.cat(losses).view(wanted.shape)


def _cross_entropy(logits_BTV, wanted_BT):
    if logits_BTV.shape[:2] != wanted_BT.shape:
        raise ValueError(
            f"the model gave logits {tuple(logits_BTV.shape)} for tokens {tuple(wanted_BT.shape)}, not one row for each"
        )
    return cross_entropy(logits_BTV.float().transpose(1, 2), wanted_BT, reduction="none")


@dataclass(frozen=True)
class Bin:
    """Mean loss over a range of positions and all documents.

    Attributes:
        first: first position, from 1.
        last: last position.
        mean: in nats per token.
        low: lower end of the 95 % confidence interval over documents (Student's t); None for one
            document.
        high: its upper end.
    """

    first: int
    last: int
    mean: float
    low: float | None
    high: float | None


def log_edges(length: int) -> list[int]:
    """Return the last positions of log-spaced bins up to length, two in each octave from 8: 8, 11, 16, 23, 32, ..."""
    return sorted({round(8 * 2 ** (k / 2)) for k in range(64) if 8 * 2 ** (k / 2) < length} | {length})


def binned(losses: Tensor) -> list[Bin]:
    """Return the mean of (documents, positions) losses in log-spaced bins, with 95 % confidence bands over documents."""
    bins = []
    for first, last in itertools.pairwise([0, *log_edges(losses.shape[1])]):
        of_documents = losses[:, first:last].double().mean(1)
        mean, count = of_documents.mean().item(), len(of_documents)
        low = high = None
        if count > 1:
            half = t_quantile(0.975, count - 1) * of_documents.std().item() / math.sqrt(count)
            low, high = mean - half, mean + half
        bins.append(Bin(first + 1, last, mean, low, high))
    return bins
