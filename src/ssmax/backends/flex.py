"""torch's FlexAttention: block masks, and the softcap inside z, without an N x S table on a GPU.

Compiled on CUDA. On the CPU torch's kernel is forward only and its unfused form materialises the scores: right, not fast.
Not yet run on a GPU by this project.
"""

import functools
import warnings

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ssmax.scaling import scale_query
from ssmax.visible import document_bounds


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    multiplier: Tensor,
    *,
    mask: Tensor | BlockMask | None,
    cu_seqlens: Tensor | None,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Arguments as in the reference, except dropout, which this kernel does not have; mask may be a BlockMask.

    With a softcap the multiplier is applied after it, inside the kernel. torch computes no gradient of it on the CPU.
    """
    assert dropout_p == 0.0
    documents = None
    if cu_seqlens is not None:
        position_T = torch.arange(key.shape[2], device=query.device)
        documents = document_bounds(cu_seqlens.to(query.device), position_T)
    if softcap is None:
        query, multiplier_inside, cap = scale_query(query, multiplier * scale), None, None
        scale = 1.0
    else:
        multiplier_inside = multiplier.expand(*query.shape[:3])
        cap = torch.full(
            (), softcap, dtype=multiplier.dtype, device=query.device
        )  # the kernel takes no symbolic number
    block_mask, bias = _masks(mask, documents, query, key, is_causal, window)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if cap is not None and multiplier_inside is not None:
            score = cap * torch.tanh(score / cap) * multiplier_inside[b, h, q]
        return score if bias is None else score + bias[b, h, q, k]

    plain = softcap is None and bias is None
    return _kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=None if plain else score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _masks(mask, documents, query, key, is_causal, window):
    """Return the block mask, and the additive mask where there is one."""
    if isinstance(mask, BlockMask):
        return mask, None
    num_queries, num_keys = query.shape[2], key.shape[2]
    offset = num_keys - num_queries
    bias = None
    if mask is not None:
        mask = mask.expand(*query.shape[:3], num_keys)
        bias = None if mask.dtype == torch.bool else mask.to(query.dtype)
        visible = mask if bias is None else mask > torch.finfo(mask.dtype).min / 2

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k >= 0
        if is_causal:
            seen = seen & (k <= q + offset)
        if window is not None:
            seen = seen & (k > q + offset - window)
        if documents is not None:
            seen = seen & (k >= documents[0][q]) & (k < documents[1][q])
        return seen if mask is None else seen & visible[b, h, q, k]

    if mask is None and documents is None and not is_causal:
        return None, None
    batch, heads = (None, None) if mask is None else query.shape[:2]
    return create_block_mask(mask_mod, batch, heads, num_queries, num_keys, device=query.device), bias


def _kernel(device):
    if device == "cuda" and not torch.compiler.is_compiling():
        return _compiled()
    return flex_attention if torch.compiler.is_compiling() else _quiet


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=True)


def _quiet(*arguments, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*arguments, **options)
