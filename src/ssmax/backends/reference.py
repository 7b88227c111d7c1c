"""The specification: the formula written out, slow, for any floating dtype. Every other backend is compared with it."""

import math

import torch
from torch import Tensor

from ssmax.visible import document_bounds


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    multiplier: Tensor,
    *,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """softmax(m softcap(scale q k) + mask) v, in float32 or float64; rows that see nothing give zeros.

    Args:
        query: (B, H, N, D); key, value: (B, H or a divisor of H, S, .).
        multiplier: (B or 1, H, N).
        mask: bool (True = visible) or additive, broadcast to (B, H, N, S).
        cu_seqlens: offsets of packed documents; a query sees its own only.
        is_causal: the queries are the last N of S positions.
        window: visible keys at most, the query's own included.
        softcap: c, for c tanh(z / c).
        scale: factor of q k.
        dropout_p: probability of dropping a weight.
    """
    wide = multiplier.dtype
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    if cu_seqlens is not None:
        position_T = torch.arange(key.shape[2], device=query.device)
        start_T, end_T = document_bounds(cu_seqlens.to(query.device), position_T)
        visible = (position_T >= start_T[:, None]) & (position_T < end_T[:, None])
    groups = query.shape[1] // key.shape[1]
    key, value = (x.to(wide).repeat_interleave(groups, 1) for x in (key, value))
    z_BHNS = query.to(wide) @ key.transpose(-1, -2) * scale
    if softcap is not None:
        z_BHNS = softcap * torch.tanh(z_BHNS / softcap)
    z_BHNS = multiplier[..., None] * z_BHNS
    if is_causal:
        last = z_BHNS.shape[-1] - z_BHNS.shape[-2]
        visible = visible.tril(last)
        if window is not None:
            visible = visible.triu(last - window + 1)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask > torch.finfo(mask.dtype).min / 2)
        z_BHNS = z_BHNS + mask.to(wide).masked_fill(~visible, 0.0)
    alive = visible.any(-1, keepdim=True)
    weights = z_BHNS.masked_fill(~visible & alive, -math.inf).softmax(-1).masked_fill(~alive, 0.0)
    return (torch.dropout(weights, dropout_p, train=True) @ value).to(query.dtype)
