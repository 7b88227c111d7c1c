"""torch's multi_head_attention_forward with a scale; nn.MultiheadAttention runs through it.

Shape suffixes: B batch, H heads, N queries, S keys, D head size.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, scaled_dot_product_attention

from ssmax.modules.sdpa import count
from ssmax.private import hidden_from_modes
from ssmax.visible import as_bool


def attend(
    ssmax: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch.nn.functional.multi_head_attention_forward with scaled queries; it takes and returns the same.

    With need_weights, the weights that it returns are those of SSMax.

    Raises:
        ValueError: a mask is a bias or has a wrong shape, the module adds keys (bias_k,
            add_zero_attn), or static keys or nested tensors are given.
    """
    check(bias_k, add_zero_attn)
    if static_k is not None or static_v is not None or query.is_nested:
        raise ValueError(
            "SSMax in multi-head attention takes neither static keys nor nested tensors; pad, and pass a mask"
        )
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if in_proj_weight is None else in_proj_weight
    heads = _project(query, key, value, num_heads, weights, in_proj_bias)
    q_BHND, k_BHSD, v_BHSD = heads
    if is_causal and attn_mask is None:
        raise ValueError("is_causal only says that attn_mask is causal; pass attn_mask as well, as in torch")
    causal = is_causal and key_padding_mask is None and not need_weights  # torch relies on the hint in the same cases
    mask = None if causal else _visible(q_BHND, k_BHSD, attn_mask, key_padding_mask)
    q_BHND = ssmax(q_BHND, count(q_BHND, k_BHSD, mask, causal))
    p = dropout_p if training else 0.0
    if need_weights:
        z_BHNS = q_BHND @ k_BHSD.mT / math.sqrt(q_BHND.shape[-1])
        weights_BHNS = (z_BHNS if mask is None else z_BHNS.masked_fill(~mask, -math.inf)).softmax(-1)
        weights_BHNS = dropout(weights_BHNS, p) if p else weights_BHNS
        output, shown = weights_BHNS @ v_BHSD, weights_BHNS.mean(1) if average_attn_weights else weights_BHNS
    else:
        with hidden_from_modes():
            output, shown = scaled_dot_product_attention(q_BHND, k_BHSD, v_BHSD, mask, p, causal), None
    output = linear(output.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if query.ndim == 3:
        return output, shown
    return output.squeeze(1), None if shown is None else shown.squeeze(0)


def check(bias_k: Tensor | None, add_zero_attn: bool) -> None:
    """Raise ValueError if the module adds keys that are not tokens; whether n counts them is not defined."""
    if bias_k is not None or add_zero_attn:
        name = "add_bias_kv" if bias_k is not None else "add_zero_attn"
        raise ValueError(f"{name}=True adds a key that is not a token; whether n counts it is not defined for SSMax")


def _project(query, key, value, num_heads, weights, bias):
    """Project inputs (N or S, B, E), or without B, to a query (B, H, N, D), and key and value (B, H, S, D)."""
    if isinstance(weights, Tensor) and query is key and key is value:  # self-attention: one product
        together = linear(query, weights, bias).chunk(3, -1)
    else:
        parts = weights.chunk(3) if isinstance(weights, Tensor) else weights
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        together = [linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True)]
    together = [x if x.ndim == 3 else x.unsqueeze(1) for x in together]
    return [x.view(*x.shape[:2], num_heads, -1).permute(1, 2, 0, 3) for x in together]


def _visible(q_BHND, k_BHSD, attn_mask, key_padding_mask):
    """Return both masks as one, (B or 1, H or 1, N or 1, S), bool, True = visible; None if there is none."""
    (batch, heads, rows), keys = q_BHND.shape[:3], k_BHSD.shape[2]
    padding = key_padding_mask if key_padding_mask is None or key_padding_mask.ndim == 2 else key_padding_mask[None]
    for mask, name, shapes in (
        (attn_mask, "attn_mask", ((rows, keys), (batch * heads, rows, keys))),
        (padding, "key_padding_mask", ((batch, keys),)),
    ):
        if mask is not None and mask.shape not in shapes:
            raise ValueError(f"{name} must have the shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
    if attn_mask is not None:
        attn_mask = _seen(attn_mask).view(
            -1 if attn_mask.ndim == 3 else 1, heads if attn_mask.ndim == 3 else 1, rows, keys
        )
    if padding is None:
        return attn_mask
    seen = _seen(padding)[:, None, None]
    return seen if attn_mask is None else attn_mask & seen


def _seen(mask):
    """Return True where a key is visible. In nn.MultiheadAttention, True in a bool mask hides a key."""
    return ~mask if mask.dtype == torch.bool else as_bool(mask)
