"""torch's FlexAttention: block masks, and the softcap inside z, without an N x S table on a GPU.

It is compiled on CUDA. On the CPU torch's kernel has no backward, and its unfused form writes out
the scores: right, but slow. This project has not yet run it on a GPU.
"""

import functools
import warnings

import torch
from torch import Tensor

from ssmax.backends.call import AttentionCall
from ssmax.scaling import scale_query


def why_not(call: AttentionCall) -> str | None:
    """Return why FlexAttention cannot: dropout, or gradients that torch lacks (on the CPU, and of values in a score_mod)."""
    if call.dropout_p > 0:
        return "has no dropout; use another impl, or dropout_p=0"
    if call.wants_gradient() and (call.query.device.type == "cpu" or call.softcap is not None):
        return (
            "computes no gradients on the CPU, nor those of s and b after a softcap; use impl='reference' "
            "or 'auto' with a tensor mask, or torch.no_grad()"
        )
    return call.why_not_mask() if call.mask is None or isinstance(call.mask, Tensor) else None


def forward(call: AttentionCall) -> Tensor:
    """Fold the multiplier into the query. With a softcap, apply it after the softcap, inside the kernel."""
    query, key, multiplier, softcap, scale = call.query, call.key, call.multiplier, call.softcap, call.scale
    if softcap is None:
        query, multiplier_inside, cap = scale_query(query, multiplier * scale), None, None
        scale = 1.0
    else:
        multiplier_inside = multiplier.expand(*query.shape[:3])
        cap = torch.full(
            (), softcap, dtype=multiplier.dtype, device=query.device
        )  # a tensor, since the kernel takes no symbolic number
    block_mask, bias = _masks(call)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if cap is not None and multiplier_inside is not None:
            score = cap * torch.tanh(score / cap) * multiplier_inside[b, h, q]
        return score if bias is None else score + bias[b, h, q, k]

    plain = softcap is None and bias is None
    return _kernel(query.device.type)(
        query,
        key,
        call.value,
        score_mod=None if plain else score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _masks(call):
    """Return the block mask and the additive mask; None for each that is not needed."""
    query, key, mask, is_causal, window = call.query, call.key, call.mask, call.is_causal, call.window
    if mask is not None and not isinstance(mask, Tensor):
        return mask, None
    documents = None if call.cu_seqlens is None else call.documents()[1:]
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
    return _torch().create_block_mask(mask_mod, batch, heads, num_queries, num_keys, device=query.device), bias


def _kernel(device):
    if torch.compiler.is_compiling():
        return _torch().flex_attention
    return _compiled() if device == "cuda" else _quiet


def _torch():
    from torch.nn.attention import flex_attention  # a second to import in older versions

    return flex_attention


@functools.cache
def _compiled():
    return torch.compile(_torch().flex_attention, dynamic=True)


def _quiet(*arguments, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return _torch().flex_attention(*arguments, **options)
