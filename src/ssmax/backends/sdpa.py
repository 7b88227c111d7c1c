"""torch's scaled_dot_product_attention with the multiplier and the scale folded into the query, rounded once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from ssmax.backends.call import AttentionCall
from ssmax.scaling import scale_query

# Rows of a block for patterns without a kernel flag. The mask has at most BLOCK x (BLOCK + window) entries.
BLOCK = 512

Attend = Callable[..., Tensor]
Block = tuple[slice, slice, Tensor]  # rows, keys, mask


def why_not(call: AttentionCall) -> str | None:
    """Return why torch's kernel cannot: a softcap, which would have to come before the multiplier, or the mask."""
    if call.softcap is not None:
        return "has no softcap; use impl='reference', 'flex' or 'auto'"
    return call.why_not_mask()


def forward(call: AttentionCall) -> Tensor:
    """Compute by one call of torch's kernel, or by one for each document or block of rows."""
    query, key, value, mask, cu_seqlens, window = (
        call.query,
        call.key,
        call.value,
        call.mask,
        call.cu_seqlens,
        call.window,
    )
    if cu_seqlens is not None and torch.compiler.is_compiling():  # reading lengths on the host would break the graph
        mask = call.in_one_document()
    # The scale is folded in too: an fp16 product near 1e5 overflows before a kernel could scale it down.
    m = call.multiplier
    scaled = query * call.scale if m is None else scale_query(query, m * call.scale)
    options: dict[str, Any] = {"dropout_p": call.dropout_p}
    if key.shape[1] != query.shape[1]:  # as a value it would be a symbol under torch.compile, which the kernel refuses
        options["enable_gqa"] = True

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        one_mask = mask is None or (query.shape[2] == 1 and mask.ndim == 4 and mask.shape[1] == 1)
        if key.shape[1] != query.shape[1] and not causal and one_mask:
            # The query heads of a group are rows of one head, so that each key is read once: about half of the kernel's time.
            groups = query.shape[1] // key.shape[1]
            rows = query.reshape(query.shape[0], key.shape[1], groups * query.shape[2], query.shape[3])
            output = scaled_dot_product_attention(rows, key, value, mask, dropout_p=call.dropout_p, scale=1.0)
            return output.reshape(*query.shape[:3], value.shape[-1])
        return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=1.0, **options)

    if mask is not None:
        offset = key.shape[2] - query.shape[2]
        mask = _narrow(mask, offset, call.is_causal, window, query.shape[2], key.shape[2], query.device)
        return _masked(attend, scaled, key, value, mask)
    if cu_seqlens is None:
        return _sequence(attend, scaled, key, value, call.is_causal, window, call.dropout_p)
    lengths = cu_seqlens.diff().tolist()
    padding = query.shape[2] - sum(lengths)
    # split, whose backward is one concatenation: slices would each have a gradient of the whole length.
    documents = zip(*(x.split([*lengths, padding], 2)[:-1] for x in (scaled, key, value)), strict=True)
    outputs = [
        _sequence(attend, of_query, of_key, of_value, call.is_causal, window, call.dropout_p)
        for of_query, of_key, of_value in documents
        if of_query.shape[2]
    ]
    outputs.append(query.new_zeros(*query.shape[:2], padding, value.shape[-1]))
    return torch.cat(outputs, 2)


def _sequence(attend, scaled, key, value, is_causal, window, dropout_p):
    """Compute one sequence without a mask."""
    num_queries, num_keys = scaled.shape[2], key.shape[2]
    offset = num_keys - num_queries
    if not is_causal:
        return attend(scaled, key, value, None)
    if num_queries == 1:
        first = 0 if window is None else max(0, num_keys - window)
        return attend(scaled, key[:, :, first:], value[:, :, first:], None)
    if window is None and offset == 0:
        return attend(scaled, key, value, None, causal=True)
    if window is not None and num_keys <= BLOCK:
        mask = _narrow(None, offset, True, window, num_queries, num_keys, scaled.device)
        return _masked(attend, scaled, key, value, mask)
    blind = min(max(0, -offset), num_queries)  # rows before the first key see nothing
    num_seeing, offset = num_queries - blind, offset + blind
    window = num_keys if window is None else min(window, num_keys)
    # All blocks use the same band, so that one mask is kept for the backward instead of one for each block.
    band = _band(min(BLOCK, num_seeing), window, scaled)
    blocks = []
    for block in range(-(-num_seeing // BLOCK)):  # torch.compile guards on the number of blocks, not on the length
        start = block * BLOCK
        stop = min(start + BLOCK, num_seeing)
        first = offset + start - window + 1
        rows_mask = band[: stop - start, max(0, -first) : stop - start + window - 1]
        blocks.append((slice(start, stop), slice(max(0, first), offset + stop), rows_mask))
    inputs = (scaled[:, :, blind:], key, value)
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if trained and dropout_p == 0 and not torch.compiler.is_compiling():
        output = _Blocks.apply(*inputs, attend, blocks)
    else:
        output = _attend_blocks(*inputs, attend, blocks)
    return output if blind == 0 else torch.nn.functional.pad(output, (0, 0, blind, 0))


def _attend_blocks(query, key, value, attend, blocks):
    return torch.cat(
        [attend(query[:, :, rows], key[:, :, keys], value[:, :, keys], mask) for rows, keys, mask in blocks], 2
    )


class _Blocks(torch.autograd.Function):
    """The blocks one by one, also in the backward. autograd would make a gradient of all keys for each block."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, attend: Attend, blocks: list[Block]) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.attend, ctx.blocks = attend, blocks
        return _attend_blocks(query, key, value, attend, blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        inputs, (grad,) = ctx.saved_tensors, grad_outputs
        totals = {i: torch.zeros_like(x) for i, x in enumerate(inputs) if ctx.needs_input_grad[i]}
        for rows, keys, mask in ctx.blocks:
            spans = (rows, keys, keys)
            parts = [
                x[:, :, span].detach().requires_grad_(i in totals)
                for i, (x, span) in enumerate(zip(inputs, spans, strict=True))
            ]
            with torch.enable_grad():
                # A scalar with the same gradient: passing grad to autograd.grad would load 30 MB of sympy.
                seed = (ctx.attend(*parts, mask) * grad[:, :, rows]).sum()
            found = torch.autograd.grad(seed, [parts[i] for i in totals])
            for (i, total), part in zip(totals.items(), found, strict=True):
                total[:, :, spans[i]] += part
        return *(totals.get(i) for i in range(3)), None, None


def _band(rows, window, like):
    """Return an additive mask in which row r sees columns r to r + window - 1. In the query's dtype the kernel needs no copy."""
    gap = torch.arange(rows + window - 1, device=like.device) - torch.arange(rows, device=like.device)[:, None]
    hidden = (gap < 0) | (gap >= window)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(hidden, -torch.inf)


def _narrow(mask, offset, is_causal, window, num_queries, num_keys, device):
    """Return the mask with causality and window."""
    if not is_causal:
        return mask
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
    if window is not None:
        visible = visible.triu(offset - window + 1)
    if mask is None or mask.dtype == torch.bool:
        return visible if mask is None else mask & visible
    return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def _masked(attend, scaled, key, value, mask):
    """Attend with a mask. A row that sees no key is computed without the mask and then set to zero, since kernels differ."""
    if mask.dtype == torch.bool:
        alive = mask.any(-1, keepdim=True)
        mask = mask | ~alive
    else:
        alive = (mask > torch.finfo(mask.dtype).min / 2).any(-1, keepdim=True)
        mask = mask.to(scaled.dtype).masked_fill(~alive, 0.0)
    return attend(scaled, key, value, mask).masked_fill(~alive, 0.0)
