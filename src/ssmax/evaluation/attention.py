"""Attention weights of single queries, without an N x N matrix (the paper's Figures 7 and 8)."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ssmax.evaluation.reading import Memory, Reader, eval_mode, relative_error, tolerance
from ssmax.evaluation.weights import Weights, recorded

CHUNK = 1024


@torch.inference_mode()
def needle_scores(model: PreTrainedModel, token_ids: Tensor, span: tuple[int, int], *, chunk: int = CHUNK) -> Tensor:
    """Return the needle score of each head: the attention that the last query gives to the tokens of span.

    The score is the sum over span of softmax(m z), where m = s log n + b in a converted layer. The
    paper does not define its score precisely; this is the attention of the query that predicts the
    first token of the answer.

    Args:
        model: a causal language model of transformers whose family has eager attention. It may be
            loaded with another.
        token_ids: (T,) or (1, T) integers, without padding.
        span: index of the needle's first token, and index after its last.
        chunk: positions in each forward pass. Fewer need less memory.

    Returns:
        (layers, heads), float32, each in [0, 1]. A layer without attention weights (a state space
        model, a convolution) has no row; a warning names it.

    Raises:
        ValueError: token_ids are not one sequence of at least 2 tokens, span is not inside it, the
            attention weights of a layer are not available, or the number of heads differs by layer.
        FloatingPointError: weights are NaN.

    Example:
        >>> scores = ssmax.evaluation.needle_scores(model, token_ids, span=(100, 112))
        >>> scores.max()  # the best head
    """
    token_ids = _one_sequence(token_ids)
    first, stop = span
    if not 0 <= first < stop <= token_ids.shape[1]:
        raise ValueError(f"span must satisfy 0 <= first < stop <= {token_ids.shape[1]}, got {span}")
    with eval_mode(model):
        reader = Reader(model, token_ids, chunk)
        token_ids = token_ids.to(model.device)
        memory = reader.read(reader.empty(1), token_ids[:, :-1])
        _, weights = attend(reader, memory, token_ids[:, -1:], token_ids.shape[1])
    weights.raise_problem()
    weights.warn_of_missing()
    return stacked(span_scores(weights.layers, [span], token_ids.shape[1])[0])


@dataclass(frozen=True)
class Sharpness:
    """How sharply the query at one position attends; each tensor is (layers, heads), float32.

    Attributes:
        n: number of tokens up to the query, itself included.
        entropy: entropy of the weights divided by the log of the layer's number of keys: 1 for
            uniform attention.
        largest: the largest weight.
        entropy_without_sink: entropy, with the first token left out and the other weights
            renormalised.
        largest_without_sink: the largest of these weights.
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
    """Return how sharply the n-th token attends, for each n of lengths.

    Each n costs one token on eager attention. All other tokens use the model's own attention.

    Args:
        model: a causal language model of transformers whose family has eager attention. It may be
            loaded with another.
        token_ids: (T,) or (1, T) integers, without padding.
        lengths: values of n, ascending, from 3 to T.
        chunk: positions in each forward pass. Fewer need less memory.

    Returns:
        One Sharpness for each n.

    Raises:
        ValueError: token_ids are not one sequence, lengths do not ascend from 3 to T, or a reason
            of needle_scores.
        FloatingPointError: weights are NaN.

    Example:
        >>> [found.largest.mean() for found in ssmax.evaluation.attention_sharpness(model, token_ids, [64, 1024])]
    """
    return [
        Sharpness(n, *(stacked({layer: of[i] for layer, of in found.items()}) for i in range(4)))
        for n, found in sharpness_by_layer(model, token_ids, lengths, chunk=chunk)
    ]


@torch.inference_mode()
def sharpness_by_layer(
    model: PreTrainedModel, token_ids: Tensor, lengths: Sequence[int], *, chunk: int = CHUNK
) -> list[tuple[int, dict[int, tuple[Tensor, ...]]]]:
    """Like attention_sharpness, but return for each n and layer the four measures, (heads,) each. Heads may differ by layer."""
    token_ids = _one_sequence(token_ids)
    lengths = list(lengths)
    if not lengths or lengths != sorted(set(lengths)) or lengths[0] < 3 or lengths[-1] > token_ids.shape[1]:
        raise ValueError(f"lengths must ascend from at least 3 to at most {token_ids.shape[1]}, got {lengths}")
    found = []
    with eval_mode(model):
        reader = Reader(model, token_ids, chunk)
        token_ids = token_ids.to(model.device)
        memory = reader.empty(1)
        for before, n in itertools.pairwise([0, *lengths]):
            memory = reader.read(memory, token_ids[:, before : n - 1])
            last = token_ids[:, n - 1 : n]
            _, weights = attend(reader, memory, last, n)
            weights.raise_problem()
            if not found:
                weights.warn_of_missing()
            found.append((n, {layer: _sharpness(n, of[0].cpu()) for layer, of in weights.layers.items()}))
            if isinstance(memory, Tensor):
                memory = reader.read(memory, last)
    return found


def _sharpness(n, weights):
    # A layer with a window has dropped the first token if it holds fewer keys than n.
    behind = weights[:, 1:] / weights[:, 1:].sum(-1, keepdim=True) if weights.shape[1] == n else weights
    entropies = [-torch.xlogy(x, x).sum(-1) / math.log(x.shape[-1]) for x in (weights, behind)]
    return entropies[0], weights.max(-1).values, entropies[1], behind.max(-1).values


def attend(reader: Reader, memory: Memory, token_ids: Tensor, length: int) -> tuple[Tensor, Weights]:
    """Read tokens (B, T) after memory; return their logits (B, T, V) and the attention weights of the first of them.

    The first is the last of `length` tokens. Only it runs on eager attention, whose weights can be
    read: some families give other logits when they return weights (Falcon ignores its mask).
    Afterwards a cache holds all tokens.
    """
    if isinstance(memory, Tensor) and not (length > 1 and reader.steps):
        return _whole(reader, torch.cat([memory, token_ids], 1), length)
    cache, size = (reader.prefilled(memory), 1) if isinstance(memory, Tensor) else (memory, reader.chunk)
    first, weights = _recorded(reader, token_ids[:, :1], cache, 0, length)
    rest = token_ids[:, 1:].split(size, 1) if token_ids.shape[1] > 1 else ()
    return torch.cat([first, *(reader.call(part, cache).logits for part in rest)], 1), weights


def _whole(reader, token_ids, length):
    """Run one forward for the logits and another for the weights. If their logits differ, refuse the weights."""
    kept = token_ids.shape[1] - length + 1
    logits = reader.call(token_ids, reader.fresh_if_needed(), logits_to_keep=kept).logits[:, -kept:]
    again, weights = _recorded(reader, token_ids[:, :length], reader.fresh_if_needed(), length - 1, length)
    if relative_error(again, logits[:, :1]) > tolerance(logits.dtype):
        weights.refuse(f"{type(reader.model).__name__} gives other logits when it returns its attention weights")
    return logits, weights


def _recorded(reader, token_ids, cache, row, length):
    """Run tokens through the model; return the logits and the attention weights of the last."""
    with recorded(reader.model, row, length) as weights:
        output = reader.call(token_ids, cache, output_attentions=True, logits_to_keep=1)
        weights.add(output)
    return output.logits[:, -1:], weights


def span_scores(layers: Mapping[int, Tensor], spans: Sequence[tuple[int, int]], length: int) -> list[dict[int, Tensor]]:
    """Return each row's weight on its span, (heads,) by layer. A layer with a window holds only the last of `length` keys."""
    whole = {layer: pad(weights, (length - weights.shape[-1], 0)) for layer, weights in layers.items()}
    return [
        {layer: weights[row, :, slice(*span)].sum(-1) for layer, weights in whole.items()}
        for row, span in enumerate(spans)
    ]


def stacked(by_layer: Mapping[int, Tensor]) -> Tensor:
    """Stack the values of all layers, (heads,) each, to (layers, heads).

    Raises:
        ValueError: the number of heads differs by layer.
    """
    if not by_layer:
        return torch.zeros(0, 0)
    heads = {layer: len(of) for layer, of in by_layer.items()}
    if len(set(heads.values())) > 1:
        raise ValueError(
            f"heads differ by layer ({', '.join(f'layer {layer}: {count}' for layer, count in heads.items())}), so they do not fit a "
            "tensor (layers, heads); ssmax evaluate writes them as rows"
        )
    return torch.stack(list(by_layer.values()))


def _one_sequence(token_ids):
    token_ids = torch.atleast_2d(token_ids)
    if token_ids.ndim != 2 or token_ids.shape[0] != 1 or token_ids.shape[1] < 2 or token_ids.is_floating_point():
        raise ValueError(f"token_ids must be one sequence of at least 2 token ids, got {tuple(token_ids.shape)}")
    return token_ids
