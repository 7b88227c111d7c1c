"""Attention weights of the few queries that matter, never an N x N matrix (the paper's Fig. 7 and 8)."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel

from ssmax.evaluation.mode import eval_mode
from ssmax.evaluation.prefix import feed

__all__ = ["Sharpness", "attend", "attention_sharpness", "needle_scores", "span_scores"]

CHUNK = 1024


@torch.inference_mode()
def needle_scores(model: PreTrainedModel, token_ids: Tensor, span: tuple[int, int], *, chunk: int = CHUNK) -> Tensor:
    """Return the attention that the last query puts on the tokens of span: the needle score of each head.

    The sum over span of softmax(m z), m = s log n + b where the model has SSMax. The paper's own words for its score
    could not be read; this is the attention from the query that emits the first answer token.

    Args:
        model: a causal language model of transformers with an eager attention.
        token_ids: (T,) or (1, T) integers, no padding.
        span: first and last + 1 index of the needle's tokens.
        chunk: positions per forward pass; smaller needs less memory.

    Returns:
        (layers, heads), float32, each in [0, 1].

    Raises:
        ValueError: token_ids are not one sequence of at least 2 tokens, or span does not lie inside it.
    """
    token_ids = _one_sequence(token_ids)
    first, stop = span
    if not 0 <= first < stop <= token_ids.shape[1]:
        raise ValueError(f"span must satisfy 0 <= first < stop <= {token_ids.shape[1]}, got {span}")
    cache = DynamicCache(config=model.config)
    with eval_mode(model):
        feed(model, token_ids[:, :-1].to(model.device), cache, chunk)
        _, weights = attend(model, token_ids[:, -1:].to(model.device), cache)
    return span_scores(weights, [span], token_ids.shape[1])[0]


@dataclass(frozen=True)
class Sharpness:
    """How sharply the query at one position attends; each tensor is (layers, heads), float32.

    Attributes:
        n: tokens up to and with the query.
        entropy: of its weights, divided by the log of the number of keys that its layer holds: 1 for uniform attention.
        largest: the largest weight.
        entropy_without_sink: the same of the weights behind the first token, renormalised.
        largest_without_sink: their largest.
    """

    n: int
    entropy: Tensor
    largest: Tensor
    entropy_without_sink: Tensor
    largest_without_sink: Tensor


@torch.inference_mode()
def attention_sharpness(
    model: PreTrainedModel, token_ids: Tensor, lengths: Sequence[int], *, chunk: int = CHUNK
) -> list[Sharpness]:
    """Return, for each n of lengths, how sharply the query behind n tokens (itself among them) attends.

    Each costs one token on eager attention; everything between passes through the model's own.

    Args:
        model: a causal language model of transformers with an eager attention.
        token_ids: (T,) or (1, T) integers, no padding.
        lengths: ascending, from 3 to T.
        chunk: positions per forward pass; smaller needs less memory.

    Raises:
        ValueError: token_ids are not one sequence, or lengths are not ascending within it.
    """
    token_ids = _one_sequence(token_ids).to(model.device)
    lengths = list(lengths)
    if not lengths or lengths != sorted(set(lengths)) or lengths[0] < 3 or lengths[-1] > token_ids.shape[1]:
        raise ValueError(f"lengths must ascend from at least 3 to at most {token_ids.shape[1]}, got {lengths}")
    cache, found = DynamicCache(config=model.config), []
    with eval_mode(model):
        for before, n in itertools.pairwise([0, *lengths]):
            feed(model, token_ids[:, before : n - 1], cache, chunk)
            _, weights = attend(model, token_ids[:, n - 1 : n], cache)
            found.append(_sharpness(n, [layer[0].cpu() for layer in weights]))
    return found


def _sharpness(n, weights):
    # A layer with a window has left the first token behind, once it holds fewer keys than there are tokens.
    behind = [layer[:, 1:] / layer[:, 1:].sum(-1, keepdim=True) if layer.shape[1] == n else layer for layer in weights]
    return Sharpness(
        n, *(torch.stack([f(x) for x in rows]) for rows in (weights, behind) for f in (_entropy, _largest))
    )


def _entropy(weights):
    return -torch.xlogy(weights, weights).sum(-1) / math.log(weights.shape[-1])


def _largest(weights):
    return weights.max(-1).values


def attend(model: PreTrainedModel, token_ids: Tensor, cache: Cache) -> tuple[Tensor, list[Tensor]]:
    """Append tokens (B, T) to the cache; return their logits (B, T, V) and what the first of them attends to.

    That is each layer's weights (B, heads, keys up to that token). The tokens run on eager attention, whose weights can be
    read, whatever implementation filled the cache. Layers without attention weights (a state space) are left out.
    """
    with _eager(model):
        output = model(input_ids=token_ids, past_key_values=cache, use_cache=True, output_attentions=True)
    later = token_ids.shape[1] - 1
    layers = [layer[:, :, 0].float() for layer in output.attentions or () if layer is not None]
    return output.logits, [layer[..., : layer.shape[-1] - later] for layer in layers]


def span_scores(weights: Sequence[Tensor], spans: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Return the weight on each row's span, (B, layers, heads); a layer with a window holds the last keys of length."""
    whole = torch.stack([pad(layer, (length - layer.shape[-1], 0)) for layer in weights], 1)
    return torch.stack([row[:, :, slice(*span)].sum(-1) for row, span in zip(whole, spans, strict=True)])


def _one_sequence(token_ids):
    token_ids = torch.atleast_2d(token_ids)
    if token_ids.ndim != 2 or token_ids.shape[0] != 1 or token_ids.shape[1] < 2 or token_ids.is_floating_point():
        raise ValueError(f"token_ids must be one sequence of at least 2 token ids, got {tuple(token_ids.shape)}")
    return token_ids


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    before: Any = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
