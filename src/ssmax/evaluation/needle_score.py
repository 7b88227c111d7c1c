"""Attention on the needle, from the one query that matters; never an N x N matrix (the paper's Fig. 7 and 8)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ssmax.evaluation.mode import eval_mode

__all__ = ["attend_last", "needle_scores"]


@torch.inference_mode()
def needle_scores(model: PreTrainedModel, token_ids: Tensor, span: tuple[int, int]) -> Tensor:
    """Return the attention that the last query puts on the tokens of span: the needle score of each head.

    The sum over span of softmax(m z), m = s log n + b where the model has SSMax. The paper's own words for its score
    could not be read; this is the attention from the query that emits the first answer token.

    Args:
        model: a causal language model of transformers with an eager attention.
        token_ids: (T,) or (1, T) integers, no padding.
        span: first and last + 1 index of the needle's tokens.

    Returns:
        (layers, heads), float32, each in [0, 1].

    Raises:
        ValueError: token_ids are not one sequence of at least 2 tokens, or span does not lie inside it.
    """
    token_ids = torch.atleast_2d(token_ids)
    if token_ids.ndim != 2 or token_ids.shape[0] != 1 or token_ids.shape[1] < 2 or token_ids.is_floating_point():
        raise ValueError(f"token_ids must be one sequence of at least 2 token ids, got {tuple(token_ids.shape)}")
    first, stop = span
    if not 0 <= first < stop <= token_ids.shape[1]:
        raise ValueError(f"span must satisfy 0 <= first < stop <= {token_ids.shape[1]}, got {span}")
    with eval_mode(model):
        _, _, attention = attend_last(model, token_ids.to(model.device))
    return attention[0, :, :, first:stop].sum(-1)


def attend_last(model: PreTrainedModel, token_ids: Tensor) -> tuple[Tensor, DynamicCache, Tensor]:
    """Run a batch of prompts and return (last logits (B, V), cache, attention of the last query (B, layers, heads, T)).

    All but the last token pass through the model's own attention; only the last query's row runs on eager attention,
    whose weights can be read.
    """
    cache = DynamicCache(config=model.config)
    model(input_ids=token_ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    with _eager(model):
        output = model(input_ids=token_ids[:, -1:], past_key_values=cache, use_cache=True, output_attentions=True)
    return output.logits[:, -1], cache, torch.stack(output.attentions, 1)[:, :, :, 0].float()


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    before: Any = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
