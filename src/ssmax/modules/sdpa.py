"""torch's scaled_dot_product_attention with a scale; n is counted from the arguments of the call."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ssmax.private import hidden_from_modes
from ssmax.visible import count_plain, visible_keys


def attend(
    ssmax: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Scale the query by the module ssmax, and call scaled_dot_product_attention; the other arguments are torch's."""
    if query.ndim == 3 and options.get("enable_gqa"):  # the first dimension is that of the heads
        row = attend(ssmax, query[None], key[None], value[None], attn_mask, dropout_p, is_causal, **options)
        return row.squeeze(0)
    batch = -3 if query.ndim > 3 else -2
    if key.ndim == query.ndim:
        query = query.expand(*torch.broadcast_shapes(query.shape[:batch], key.shape[:batch]), *query.shape[batch:])
    n = count(query, key, attn_mask, is_causal)
    scaled = ssmax(_as_batch(query), n).reshape(query.shape)
    with hidden_from_modes():  # outer scopes would scale the call again
        return scaled_dot_product_attention(scaled, key, value, attn_mask, dropout_p, is_causal, **options)


def num_heads(query: Tensor, grouped: bool = False) -> int:
    """Return the number of heads of a query (..., H, N, D). A 3-D one is (B, N, D) with one head, or (H, N, D) if keys are grouped."""
    return query.shape[-3] if query.ndim > 3 or (grouped and query.ndim == 3) else 1


def _as_batch(query):
    """Return a query (..., H, N, D) or (B, N, D) as (B, H, N, D)."""
    return query if query.ndim == 4 else query.reshape(-1, num_heads(query), *query.shape[-2:])


def count(query: Tensor, key: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor | int:
    """Return n, the number of keys that each row of the query sees, as SSMaxScale takes it for (B, H, N, D).

    The rules are torch's. With is_causal, query i sees keys 0 to i, also if N and S differ. A mask
    broadcasts to (..., H, N, S); True or 0 is visible, False or -inf is hidden.

    Raises:
        ValueError: the mask is a bias (other finite values), or the tensors are nested.
    """
    if query.is_nested:
        raise ValueError("SSMax does not count n of nested tensors; pass padded tensors and a mask")
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if attn_mask is None:
        if not is_causal:
            return num_keys
        return count_plain(num_queries, num_keys, causal=True, top_left=True, device=query.device)
    if type(attn_mask).__name__ == "CausalBias":  # its own values are not filled in
        raise ValueError("a mask of torch.nn.attention.bias cannot be read; pass is_causal=True or a bool mask")
    mask = attn_mask.expand(*attn_mask.shape[:-1], num_keys)
    if query.ndim < 4 and mask.ndim > 2:
        mask = mask.unsqueeze(-3)
    if query.ndim > 4:
        mask = mask.expand(*query.shape[:-2], *mask.shape[-2:]).flatten(0, -4)
    return visible_keys(mask=mask[(None,) * (4 - mask.ndim)])
