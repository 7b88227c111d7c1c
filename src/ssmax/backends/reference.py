"""The specification: the formula as code, slow and exact, for any floating dtype. All other backends are compared with it."""

import math

import torch
from torch import Tensor

from ssmax.backends.call import AttentionCall


def why_not(call: AttentionCall) -> str | None:
    """Return why not: only a BlockMask, which FlexAttention alone can read."""
    return call.why_not_mask(rounds=False)


def forward(call: AttentionCall) -> Tensor:
    """Return softmax(m softcap(scale q k) + mask) v, computed in float32 or float64. Rows that see no key give zeros."""
    query, key, value, multiplier, mask = call.query, call.key, call.value, call.multiplier, call.mask
    wide = multiplier.dtype
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    if call.cu_seqlens is not None:
        visible = call.in_one_document()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.to(wide).repeat_interleave(groups, 1) for x in (key, value))
    z_BHNS = query.to(wide) @ key.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        z_BHNS = call.softcap * torch.tanh(z_BHNS / call.softcap)
    z_BHNS = multiplier[..., None] * z_BHNS
    if call.is_causal:
        last = z_BHNS.shape[-1] - z_BHNS.shape[-2]
        visible = visible.tril(last)
        if call.window is not None:
            visible = visible.triu(last - call.window + 1)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask > torch.finfo(mask.dtype).min / 2)
        z_BHNS = z_BHNS + mask.to(wide).masked_fill(~visible, 0.0)
    alive = visible.any(-1, keepdim=True)
    weights = z_BHNS.masked_fill(~visible & alive, -math.inf).softmax(-1).masked_fill(~alive, 0.0)
    return (torch.dropout(weights, call.dropout_p, train=True) @ value).to(query.dtype)
