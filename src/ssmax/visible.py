"""The counting of n, the number of keys that each query sees: from lengths, masks, positions, documents and blocks.

Shape suffixes: B batch, H heads, N queries, S keys, T packed tokens, D documents.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmax.arguments import as_count, check_flag, check_plain, is_readable, whole_number

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Rows of a block mask that are counted at once.
ROWS = 512
ENDLESS = 2**40
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def visible_keys(
    *,
    num_queries: int | None = None,
    num_keys: int | None = None,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Count the keys that each query sees: the n of SSMax.

    Exactly one of mask, position_ids, cu_seqlens and num_keys describes what is visible. The other arguments restrict it.

    Args:
        num_queries: number of queries, which are the last positions, as in a cached decode. Default: all positions. With
            cu_seqlens it may exceed the packed total: positions after the last document are padding and see nothing.
            Without causal it is free, since the queries of cross attention are not positions among the keys.
        num_keys: length of a plain sequence.
        mask: (B, S), a padding mask in which True or 1 is a real token; or (B, 1 or H, N, S), all that is visible, to which
            causal adds nothing. bool, 0/1 integers, or additive (0 = visible, -inf or the dtype's minimum = hidden).
        position_ids: (B, N) or (N,), the position of each query in its document, from 0. Positions that restart describe
            packed documents. The positions of a context-parallel shard must be global.
        cu_seqlens: (D + 1,), integer offsets of packed documents, from 0. Documents may be empty.
        window: largest number of keys that a query sees, itself included (Hugging Face's sliding_window; FlashAttention's
            window_size = (window - 1, 0)). Causal only.
        chunk: a query sees only the keys of its own chunk of this many positions, counted from its document's first token.
        causal: a query sees no later key.

    Returns:
        int64, (1, N) for num_keys and cu_seqlens, (B, N) otherwise, (B, H, N) for a mask with H > 1 heads.

    Raises:
        TypeError: mask, position_ids or cu_seqlens is not a tensor.
        ValueError: none or several of the four descriptions, wrong shapes or values, or arguments that do not determine n.
            Values are checked if that needs no device synchronisation (on the CPU).

    Example:
        >>> ssmax.visible_keys(num_keys=5, window=3)
        tensor([[1, 2, 3, 3, 3]])
    """
    sources = {"mask": mask, "position_ids": position_ids, "cu_seqlens": cu_seqlens, "num_keys": num_keys}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"exactly one of mask, position_ids, cu_seqlens and num_keys says what is visible; got {given or 'none'}"
        )
    num_queries, window, chunk = (
        None if value is None else whole_number(value, name, 1)
        for name, value in (("num_queries", num_queries), ("window", window), ("chunk", chunk))
    )
    for name, value in (("mask", mask), ("position_ids", position_ids), ("cu_seqlens", cu_seqlens)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value is not None:
            check_plain(value, name)
    check_flag(causal, "causal")
    if window is not None and not causal:
        raise ValueError("window is defined for causal attention only; for a two-sided window pass the 4-D mask")
    if position_ids is not None:
        return _from_positions(position_ids, num_queries, window, chunk, causal)
    if cu_seqlens is not None:
        return _from_documents(cu_seqlens, num_queries, window, chunk, causal)
    if mask is not None and mask.ndim == 4:
        return _from_full_mask(mask, num_queries, window, chunk)
    if mask is not None:
        return _from_padding(mask, num_queries, window, chunk, causal)
    return _from_length(num_keys, num_queries, window, chunk, causal)


def _from_length(num_keys, num_queries, window, chunk, causal):
    num_keys = whole_number(num_keys, "num_keys", 0)
    num_queries = num_keys if num_queries is None else num_queries
    if not causal and chunk is None:  # also cross attention, whose queries are not positions among the keys
        return torch.full((1, num_queries), num_keys)
    _check_last(num_queries, num_keys, "num_keys")
    first, stop = _interval(torch.arange(num_keys - num_queries, num_keys), 0, num_keys, window, chunk, causal)
    return (stop - first)[None]


def _from_positions(position_ids, num_queries, window, chunk, causal):
    if position_ids.ndim not in (1, 2) or position_ids.dtype not in INTEGERS:
        raise ValueError(
            f"position_ids must be integers of shape (B, N) or (N,), got {position_ids.dtype} {tuple(position_ids.shape)}"
        )
    if not causal:
        raise ValueError(
            "position_ids say how many keys precede a query, not how many follow; without causal pass mask or cu_seqlens"
        )
    if is_readable(position_ids) and (position_ids < 0).any():
        raise ValueError(f"position_ids must not be negative, got {int(position_ids.min())}")
    position_BN = torch.atleast_2d(position_ids).long()
    if num_queries is not None:
        _check_last(num_queries, position_BN.shape[1], "position_ids")
        position_BN = position_BN[:, -num_queries:]
    first, stop = _interval(position_BN, 0, None, window, chunk, causal)
    return stop - first


def _from_documents(cu_seqlens, num_queries, window, chunk, causal):
    check_offsets(cu_seqlens)
    if cu_seqlens.is_meta and num_queries is None:
        raise ValueError("num_queries is needed if cu_seqlens is on the meta device, where it has no values")
    total = cu_seqlens[-1].long()
    if num_queries is None:
        position_T = torch.arange(int(total), device=cu_seqlens.device)
    else:
        position_T = torch.arange(num_queries, device=cu_seqlens.device) + (total - num_queries).clamp(min=0)
    start, end = document_bounds(cu_seqlens, position_T)
    first, stop = _interval(position_T, start, end, window, chunk, causal)
    return torch.where(position_T < total, stop - first, 0)[None]


def _from_padding(mask, num_queries, window, chunk, causal):
    if mask.ndim != 2:
        raise ValueError(f"mask must be (B, S) or (B, 1 or H, N, S), got shape {tuple(mask.shape)}")
    real_BS = as_bool(mask)
    num_keys = real_BS.shape[1]
    num_queries = num_keys if num_queries is None else num_queries
    if not causal and chunk is None:
        return real_BS.sum(1, keepdim=True).expand(-1, num_queries)
    _check_last(num_queries, num_keys, "mask")
    # Chunks are counted from the first real token of each row, as transformers does.
    start_B1 = real_BS.to(torch.uint8).argmax(1, keepdim=True) if num_keys else torch.zeros_like(mask)
    position_N = torch.arange(num_keys - num_queries, num_keys, device=mask.device)[None]
    first, stop = _interval(position_N, start_B1, num_keys, window, chunk, causal)
    before = torch.nn.functional.pad(real_BS.long().cumsum(1), (1, 0))
    stop = stop.expand(len(before), -1).clamp(min=0)
    first = torch.minimum(first.expand(len(before), -1).clamp(min=0), stop)
    return before.gather(1, stop) - before.gather(1, first)


def _from_full_mask(mask, num_queries, window, chunk):
    visible = as_bool(mask)
    num_rows, num_keys = visible.shape[-2:]
    if num_queries is not None and num_queries != num_rows:
        raise ValueError(f"num_queries is {num_queries}, but the mask has {num_rows} query rows")
    if window is not None or chunk is not None:
        _check_last(num_rows, num_keys, "mask")
        position_N1 = torch.arange(num_keys - num_rows, num_keys, device=mask.device)[:, None]
        first, stop = _interval(position_N1, 0, num_keys, window, chunk, causal=False)
        key_S = torch.arange(num_keys, device=mask.device)
        if window is not None and is_readable(mask) and (visible & (key_S > position_N1)).any():
            raise ValueError(
                "window is defined for causal attention only, but the mask shows later keys; narrow the mask itself"
            )
        visible = visible & (key_S >= first) & (key_S < stop)
    n_BHN = _count_true(visible)
    return n_BHN.squeeze(1) if n_BHN.shape[1] == 1 else n_BHN


def _count_true(mask):
    """Return mask.sum(-1). On a CPU torch adds bools one by one; here eight of them are added as the bytes of an int64."""
    if not is_readable(mask) or mask.numel() < 1 << 16:
        return mask.sum(-1)
    words = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).contiguous().view(torch.int64)
    parts = words.split(255, -1)  # a byte holds a sum of up to 255 bools
    return torch.cat([part.sum(-1, keepdim=True).view(torch.uint8) for part in parts], -1).sum(-1)


def _interval(position, start, end, window, chunk, causal):
    """Return the half-open range of keys open to a query, inside its document [start, end)."""
    first = start + torch.zeros_like(position)
    stop = position + 1 if causal else end + torch.zeros_like(position)
    if chunk is not None:
        first = start + (position - start).div(chunk, rounding_mode="floor") * chunk
        stop = torch.minimum(stop, first + chunk)
    if window is not None:
        first = torch.maximum(torch.as_tensor(first), position - window + 1)
    return first, stop


def _check_last(num_queries: int, available: int, name: str) -> None:
    if num_queries > available:
        raise ValueError(f"num_queries is {num_queries}, more than the {available} positions of {name}")


def count_plain(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    top_left: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Count n without a mask, (N,).

    Args:
        num_queries: N.
        num_keys: S.
        causal: a query sees no later key; the queries are the last N positions.
        top_left: the queries are the first N positions instead, as in torch.
        device: device of the result.
    """
    if not causal:
        return torch.full((num_queries,), num_keys, device=device)
    first = 0 if top_left else num_keys - num_queries
    return (torch.arange(first, first + num_queries, device=device) + 1).clamp(min=0, max=num_keys)


def count_at(position: Tensor, window: int | None = None) -> Tensor:
    """Count n for causal queries by their positions (from 0) in their documents, with or without a window."""
    return position + 1 if window is None else (position + 1).clamp(max=window)


def count_range(place: Tensor, num_keys: Tensor | int, window: int | None = None, causal: bool = True) -> Tensor:
    """Count n as FlashAttention does, for queries at places (from 0) among the keys. Without causal, a window has two sides."""
    after = torch.full_like(place, 0 if causal else ENDLESS if window is None else window - 1)
    before = torch.full_like(place, ENDLESS if window is None else window - 1)
    stop = torch.minimum(place + after + 1, torch.as_tensor(num_keys, device=place.device))
    return (stop - (place - before).clamp(min=0)).clamp(min=0)


def count_unpadded(real_BS: Tensor, num_queries: int, window: int | None, causal: bool) -> Tensor:
    """Count n if padding is removed before the kernel: a window counts real keys only, and a single query is the last key."""
    keys_B1 = real_BS.sum(1, keepdim=True)
    if num_queries == 1:
        return count_range(keys_B1 - 1, keys_B1, window, causal)
    n = count_range((real_BS.cumsum(1) - 1)[:, -num_queries:], keys_B1, window, causal)
    return torch.where(real_BS[:, -num_queries:], n, 0)


def count_packed(ends_q: Tensor, ends_k: Tensor, num_queries: int, window: int | None, causal: bool) -> Tensor:
    """Count n for packed queries, (N,): the last positions of each document. Rows outside of documents see nothing."""
    ends_q, ends_k = ends_q.long(), ends_k.long()
    row = torch.arange(num_queries, device=ends_q.device)
    end = torch.searchsorted(ends_q, row, right=True)
    inside = (end > 0) & (end < ends_q.numel())
    end = end.clamp(1, ends_q.numel() - 1)
    keys = ends_k[end] - ends_k[end - 1]
    return torch.where(inside, count_range(keys - (ends_q[end] - row), keys, window, causal), 0)


def count_blocks(mask: "BlockMask") -> Tensor:
    """Count n under a BlockMask of FlexAttention, (B, H, N), a few rows at a time."""
    batch, heads, rows, keys = mask.shape
    device = mask.kv_num_blocks.device
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[:, None, None]
    key = torch.arange(keys, device=device)
    blocks = torch.arange(rows, device=device)[:, None].split(ROWS)
    return torch.cat([mask.mask_mod(b, h, q, key).expand(batch, heads, len(q), keys).sum(-1) for q in blocks], -1)


def check_offsets(cu_seqlens: Tensor) -> None:
    """Raise ValueError unless these are the offsets of packed documents."""
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in INTEGERS:
        raise ValueError(
            f"cu_seqlens must be integers of shape (D + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if is_readable(cu_seqlens) and (cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must start at 0 and never decrease, got {cu_seqlens.tolist()[:8]}")


def document_bounds(cu_seqlens: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the document of each packed position starts and ends. Positions after the last document are padding.

    Padding gets an empty range: both bounds are the last offset.
    """
    ends = cu_seqlens.long()
    document = torch.searchsorted(ends, position_T, right=True)  # it ends at the first offset after the position
    return ends[(document - 1).clamp(min=0)], ends[document.clamp(max=ends.numel() - 1)]


def as_bool(mask: Tensor) -> Tensor:
    """Read a bool, 0/1 or additive mask as True = visible."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point():
        if mask.requires_grad:  # a bias also where it starts at zero
            raise ValueError("an additive mask that is learned is a bias; pass a bool mask, and n itself beside a bias")
        floor = torch.finfo(mask.dtype).min / 2
        if is_readable(mask) and not ((mask == 0) | (mask <= floor)).all():
            bad = mask[(mask != 0) & ~(mask <= floor)][0].item()
            raise ValueError(
                f"an additive mask holds 0 (visible) and -inf or the dtype's minimum (hidden), got {bad:g}, which leaves "
                "open whether that key counts; pass a bool mask, or n itself where the values are a bias"
            )
        return mask > floor
    if mask.dtype not in INTEGERS:
        raise ValueError(f"mask must be bool, 0/1 integers or floating point, got {mask.dtype}")
    if is_readable(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"an integer mask holds 0 and 1 only, got values {mask.min().item()} to {mask.max().item()}")
    return mask != 0


def rows_of(n: Tensor | int, query: Tensor) -> Tensor:
    """Return n as (B or 1, H or 1, N or 1). Raise ValueError if it does not fit the query (B, H, N, D)."""
    n = as_count(n, query.device)
    n_BHN = n[:, None] if n.ndim == 2 else n.reshape((1,) * max(0, 3 - n.ndim) + n.shape)
    wanted = query.shape[:3]
    if n_BHN.ndim != 3 or any(have != 1 and have != want for have, want in zip(n_BHN.shape, wanted, strict=True)):
        raise ValueError(
            f"n must be a number, (N,), (B, N) or (B, H, N) for B, H, N = {tuple(wanted)}, got {tuple(n.shape)}"
        )
    return n_BHN
