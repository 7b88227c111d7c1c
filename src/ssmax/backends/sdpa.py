"""torch's scaled_dot_product_attention with the multiplier and the scale folded into the query, rounded once."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ssmax.scaling import scale_query

# Rows of a block where the kernel has no flag for the pattern: bounds the mask to BLOCK x (BLOCK + window).
BLOCK = 512


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    multiplier: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    softcap: None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Arguments as in the reference, except softcap, which this kernel does not have."""
    assert softcap is None
    # The scale is folded in too: an fp16 product near 1e5 overflows before a kernel could scale it down.
    scaled = scale_query(query, multiplier * scale)
    dropout = {"dropout_p": dropout_p, "enable_gqa": key.shape[1] != query.shape[1]}

    def attend(rows: Tensor, first: int, stop: int, rows_mask: Tensor | None, causal: bool = False) -> Tensor:
        return scaled_dot_product_attention(
            rows, key[:, :, first:stop], value[:, :, first:stop], rows_mask, is_causal=causal, scale=1.0, **dropout
        )

    num_queries, num_keys = query.shape[2], key.shape[2]
    offset = num_keys - num_queries
    if mask is not None:
        return _masked(
            attend, scaled, num_keys, _narrow(mask, offset, is_causal, window, num_queries, num_keys, query.device)
        )
    if not is_causal:
        return attend(scaled, 0, num_keys, None)
    if num_queries == 1:
        return attend(scaled, 0 if window is None else max(0, num_keys - window), num_keys, None)
    if window is None and offset == 0:
        return attend(scaled, 0, num_keys, None, causal=True)
    if window is not None and num_keys <= BLOCK:
        return _masked(
            attend, scaled, num_keys, _narrow(None, offset, True, window, num_queries, num_keys, query.device)
        )
    blind = min(max(0, -offset), num_queries)  # rows before the first key see nothing
    outputs = [scaled.new_zeros(*scaled.shape[:2], blind, value.shape[-1])] if blind else []
    window = num_keys if window is None else min(window, num_keys)
    band = _band(min(BLOCK, num_queries), window, scaled)
    for start in range(blind, num_queries, BLOCK):
        stop = min(start + BLOCK, num_queries)
        first = offset + start - window + 1
        # All blocks look at the same band, so that one mask is kept for the backward and not one a block.
        outputs.append(
            attend(
                scaled[:, :, start:stop],
                max(0, first),
                offset + stop,
                band[: stop - start, max(0, -first) : stop - start + window - 1],
            )
        )
    return torch.cat(outputs, 2)


def _band(rows, window, like):
    """Row r sees columns r to r + window - 1; additive, in the query's dtype, so that the kernel keeps no copy."""
    gap = torch.arange(rows + window - 1, device=like.device) - torch.arange(rows, device=like.device)[:, None]
    hidden = (gap < 0) | (gap >= window)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(hidden, -torch.inf)


def _narrow(mask, offset, is_causal, window, num_queries, num_keys, device):
    """Put causality and window into the mask."""
    if not is_causal:
        return mask
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
    if window is not None:
        visible = visible.triu(offset - window + 1)
    if mask is None or mask.dtype == torch.bool:
        return visible if mask is None else mask & visible
    return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def _masked(attend, scaled, num_keys, mask):
    """Attend under a mask; a row that sees nothing is computed open and then zeroed, since kernels differ on it."""
    if mask.dtype == torch.bool:
        alive = mask.any(-1, keepdim=True)
        mask = mask | ~alive
    else:
        alive = (mask > torch.finfo(mask.dtype).min / 2).any(-1, keepdim=True)
        mask = mask.to(scaled.dtype).masked_fill(~alive, 0.0)
    return attend(scaled, 0, num_keys, mask).masked_fill(~alive, 0.0)
