"""The definition: n visible keys, the multiplier s log n + b, and Scalable-Softmax itself (arXiv 2501.19399).

Shape suffixes: B batch, H heads, N queries, S keys, T packed tokens, D documents.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ssmax.arguments import check_flag, check_plain, whole_number
from ssmax.versions import require

__all__ = ["matched_scale", "multiplier", "scalable_softmax", "visible_keys"]

require("torch", torch.__version__)


def matched_scale(train_length: int) -> float:
    """Return the s at which SSMax is on average as sharp as Softmax over the training length.

    s = 1 / mean(log n, n = 1 .. train_length), the paper's starting value: 0.16847 for 1,024.

    Raises:
        ValueError: train_length below 2, where every log n is zero.
    """
    if train_length < 2:
        raise ValueError(f"train_length must be at least 2, since log 1 = 0 and no scale can match; got {train_length}")
    return train_length / math.lgamma(train_length + 1)


def multiplier(n: Tensor, s: Tensor | float, b: Tensor | float | None = None, *, dtype: torch.dtype) -> Tensor:
    """Return s log n + b, computed in at least float32.

    Args:
        n: number of visible keys, any real dtype. n = 0 counts as 1: such a row has no weight to sharpen.
        s: scale, broadcast against n.
        b: bias, broadcast against n.
        dtype: float64 if the query is float64, else float32; nothing narrower, since log n in bfloat16 is wrong by 8e-3.
    """
    m = torch.as_tensor(s, dtype=dtype, device=n.device) * n.clamp(min=1).to(dtype).log()
    return m if b is None else m + torch.as_tensor(b, dtype=dtype, device=n.device)


def head_multiplier(n: Tensor | int, s: Tensor | float, b: Tensor | float | None, query: Tensor) -> Tensor:
    """Return the multiplier of each query row: (B or 1, H or 1, N), float32 (float64 for a float64 query).

    Args:
        n: a number, (N,), (B or 1, N) or (B or 1, H or 1, N).
        s: a number, (), (1,) or (H,).
        b: as s, or None.
        query: (B, H, N, D).

    Raises:
        ValueError: n, s or b does not have such a shape, or n is negative.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    # One n for all rows, as in a decode step, which pays for each small operation: its log is python's.
    one = isinstance(n, int) and not torch.compiler.is_compiling()
    if one and not isinstance(s, Tensor) and not isinstance(b, Tensor):
        m = _finite(s, "s") * math.log(max(_number(n), 1)) + (0.0 if b is None else _finite(b, "b"))
        return torch.full((1, 1, query.shape[2]), m, dtype=wide, device=query.device)
    s, b = _per_head(s, query, "s"), None if b is None else _per_head(b, query, "b")
    if one:
        m_H1 = s.to(wide) * math.log(max(_number(n), 1))
        return (m_H1 if b is None else m_H1 + b.to(wide)).expand(1, -1, query.shape[2])
    return multiplier(rows_of(n, query), s, b, dtype=wide).expand(-1, -1, query.shape[2])


def log_visible(n_BHN: Tensor, query: Tensor) -> Tensor:
    """Return log n as it multiplies the query, (B or 1, H or 1, N or 1, 1); float32 (float64 for a float64 query).

    Args:
        n_BHN: as rows_of returns it. n = 0 counts as 1.
        query: (B, H, N, D).
    """
    return n_BHN[..., None].clamp(min=1).to(torch.float64 if query.dtype == torch.float64 else torch.float32).log()


def rows_of(n: Tensor | int, query: Tensor) -> Tensor:
    """Return n as (B or 1, H or 1, N or 1), or raise ValueError where it does not fit the query (B, H, N, D)."""
    n = _count(n, query.device)
    n_BHN = n[:, None] if n.ndim == 2 else n.reshape((1,) * max(0, 3 - n.ndim) + n.shape)
    wanted = query.shape[:3]
    if n_BHN.ndim != 3 or any(have != 1 and have != want for have, want in zip(n_BHN.shape, wanted, strict=True)):
        raise ValueError(
            f"n must be a number, (N,), (B, N) or (B, H, N) for B, H, N = {tuple(wanted)}, got {tuple(n.shape)}"
        )
    return n_BHN


def _per_head(value: Tensor | float, query: Tensor, name: str) -> Tensor:
    heads = query.shape[1]
    value = _real(value, name, torch.float64 if query.dtype == torch.float64 else torch.float32, query.device)
    if value.shape not in ((), (1,), (heads,)):
        raise ValueError(f"{name} must be a number or one value for each of {heads} heads, got {tuple(value.shape)}")
    return value.reshape(-1, 1)


def scale_query(query: Tensor, m: Tensor) -> Tensor:
    """Multiply each query row by m: in m's dtype, rounded once to the query's.

    Args:
        query: (B, H, N, D).
        m: (B or 1, H or 1, N), float32 or float64.
    """
    return (query * m.unsqueeze(-1)).to(query.dtype)


def scalable_softmax(
    z: Tensor,
    s: Tensor | float = 1.0,
    b: Tensor | float = 0.0,
    *,
    n: Tensor | int | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Scalable-Softmax of the logits z along dim: softmax((s log n + b) z), Eq. 2 of arXiv 2501.19399.

    Args:
        z: logits, any shape, floating point. An entry of -inf is not visible.
        s: scale; a number, or a tensor that broadcasts against z with dim reduced to 1.
        b: bias, as s.
        n: number of visible entries; a number, or a tensor that broadcasts against z with dim reduced to 1.
            Default: counted along dim.
        mask: bool, True = visible, broadcast to z.
        dim: the dimension that sums to 1.

    Returns:
        Weights in z's shape and dtype, computed in float32 (float64 for float64). A row with no visible entry, or
        with n = 0, is all zeros and passes no gradient.

    Raises:
        TypeError: z is not floating point, or mask is not bool.
        ValueError: mask, n, s or b does not broadcast as said, or n is negative.
    """
    if not isinstance(z, Tensor) or not z.is_floating_point():
        raise TypeError(f"z must be a floating point tensor, got {getattr(z, 'dtype', type(z).__name__)}")
    check_plain(z, "z", z.device)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        raise TypeError(
            f"mask must be a bool tensor (True = visible), got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    if mask is not None:
        check_plain(mask, "mask", z.device)
    if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)) or not -z.ndim <= dim < z.ndim:
        raise ValueError(f"dim must be one of z's {z.ndim} dimensions, got {dim!r}")
    row = list(z.shape)
    row[dim] = 1
    visible = (z > -math.inf) | z.isnan()  # a NaN that is seen must surface
    if mask is not None:
        visible = visible & _broadcast(mask, z.shape, "mask")
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    n_row = visible.sum(dim, keepdim=True) if n is None else _broadcast(_count(n, z.device), row, "n")
    s_row, b_row = (_broadcast(_real(x, name, wide, z.device), row, name) for x, name in ((s, "s"), (b, "b")))
    scaled = z.to(wide).masked_fill(~visible, 0.0) * multiplier(n_row, s_row, b_row, dtype=wide)
    alive = visible.any(dim, keepdim=True) & (n_row > 0)
    # Dead rows get finite logits first and zeros after, so that no NaN reaches the gradient.
    weights = scaled.masked_fill(~visible & alive, -math.inf).softmax(dim)
    return weights.masked_fill(~(visible & alive), 0.0).to(z.dtype)


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

    Exactly one of mask, position_ids, cu_seqlens and num_keys says what is visible; the rest narrows it.

    Args:
        num_queries: how many of the last positions ask, as in a cached decode; default all. With cu_seqlens it may
            exceed the packed total: the positions behind the last document are padding and see nothing. Without
            causal it is free: the queries of cross attention are no positions among the keys.
        num_keys: a plain sequence of so many keys.
        mask: (B, S) padding mask, True or 1 = a real token; or (B, 1 or H, N, S), the whole visibility, to which
            causal adds nothing. bool, 0/1 integers, or additive (0 = visible, -inf or the dtype's minimum = hidden).
        position_ids: (B, N) or (N,), the position of each query in its own document, from 0; restarts pack documents.
            Global positions of a shard (context parallel) are right as they are.
        cu_seqlens: (D + 1,), integer offsets of packed documents, from 0; empty documents are allowed.
        window: a query sees at most so many keys, itself included (Hugging Face's sliding_window; FlashAttention's
            window_size = (window - 1, 0)). Causal only.
        chunk: a query sees only keys of its own chunk of so many positions, counted from its document's first token.
        causal: a query sees no later key.

    Returns:
        int64, (1, N) for num_keys and cu_seqlens, (B, N) otherwise, (B, H, N) for a mask that has H > 1 heads.

    Raises:
        TypeError: mask, position_ids or cu_seqlens is no tensor.
        ValueError: none or several sources of visibility, wrong shapes or values, or a combination that does not
            determine n. Never a guess. Values are checked where that costs no device synchronisation (on the CPU).
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
    if not causal and chunk is None:  # also cross attention, whose queries are no positions among the keys
        return torch.full((1, num_queries), num_keys)
    _check_last(num_queries, num_keys, "num_keys")
    first, stop = _interval(torch.arange(num_keys - num_queries, num_keys), 0, num_keys, window, chunk, causal)
    return (stop - first)[None]


def _from_positions(position_ids, num_queries, window, chunk, causal):
    if position_ids.ndim not in (1, 2) or position_ids.dtype not in _INTEGERS:
        raise ValueError(
            f"position_ids must be integers of shape (B, N) or (N,), got {position_ids.dtype} {tuple(position_ids.shape)}"
        )
    if not causal:
        raise ValueError(
            "position_ids say what precedes a query, not what follows; without causal pass mask or cu_seqlens"
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
        raise ValueError("num_queries is needed where cu_seqlens has no values to read (on the meta device)")
    total = cu_seqlens[-1].long()
    if num_queries is None:
        position_T = torch.arange(int(total), device=cu_seqlens.device)
    else:
        position_T = torch.arange(num_queries, device=cu_seqlens.device) + (total - num_queries).clamp(min=0)
    start, end = document_bounds(cu_seqlens, position_T)
    first, stop = _interval(position_T, start, end, window, chunk, causal)
    return torch.where(position_T < total, stop - first, 0)[None]


def check_offsets(cu_seqlens: Tensor) -> None:
    """Raise ValueError unless these are the offsets of packed documents."""
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in _INTEGERS:
        raise ValueError(
            f"cu_seqlens must be integers of shape (D + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if is_readable(cu_seqlens) and (cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must start at 0 and never decrease, got {cu_seqlens.tolist()[:8]}")


def document_bounds(cu_seqlens: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the document of each packed position starts and ends; behind the last one there is only padding.

    Padding gets an empty range: both bounds are the last offset.
    """
    ends = cu_seqlens.long()
    document = torch.searchsorted(ends, position_T, right=True)  # it ends at the first offset behind the position
    return ends[(document - 1).clamp(min=0)], ends[document.clamp(max=ends.numel() - 1)]


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
    n_BHN = visible.sum(-1)
    return n_BHN.squeeze(1) if n_BHN.shape[1] == 1 else n_BHN


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


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def as_bool(mask: Tensor) -> Tensor:
    """Read a bool, 0/1 or additive mask as True = visible."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point():
        floor = torch.finfo(mask.dtype).min / 2
        if is_readable(mask) and not ((mask == 0) | (mask <= floor)).all():
            bad = mask[(mask != 0) & ~(mask <= floor)][0].item()
            raise ValueError(
                f"an additive mask holds 0 (visible) and -inf or the dtype's minimum (hidden), got {bad:g}, which leaves "
                "open whether that key counts; pass a bool mask, or n itself where the values are a bias"
            )
        return mask > floor
    if mask.dtype not in _INTEGERS:
        raise ValueError(f"mask must be bool, 0/1 integers or floating point, got {mask.dtype}")
    if is_readable(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"an integer mask holds 0 and 1 only, got values {mask.min().item()} to {mask.max().item()}")
    return mask != 0


def is_readable(tensor: Tensor) -> bool:
    """Whether looking at the values costs no device synchronisation and no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_last(num_queries: int, available: int, name: str) -> None:
    if num_queries > available:
        raise ValueError(f"num_queries is {num_queries}, more than the {available} positions of {name}")


def _real(value: Tensor | float, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return _moved(value, name, device)
    return torch.full((), _finite(value, name), dtype=dtype, device=device)


def _finite(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a tensor or a number, got {type(value).__name__}")
    if not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _count(n: Tensor | int, device: torch.device) -> Tensor:
    if not isinstance(n, Tensor):
        # torch.full takes a symbolic size as it is; as_tensor would compile anew for each number.
        return torch.full((), _number(n), device=device)
    n = _moved(n, "n", device)
    if is_readable(n) and not ((n >= 0) & (n < math.inf)).all():
        raise ValueError(
            f"n counts visible keys and must be finite and not negative, got {n.min().item()} to {n.max().item()}"
        )
    return n


def _number(n):
    if isinstance(n, bool) or not isinstance(n, (int, float, np.integer, np.floating)):
        raise TypeError(f"n must be a tensor or a number, got {type(n).__name__}")
    if not torch.compiler.is_compiling() and not 0 <= n < 2**63:
        raise ValueError(f"n counts visible keys and must be finite and not negative, got {n}")
    return n


def _moved(tensor: Tensor, name: str, device: torch.device) -> Tensor:
    """To the device; what is on the meta device has nothing to move."""
    check_plain(tensor, name, device if tensor.device.type == "meta" else None)
    return tensor.to(device)


def _broadcast(tensor: Tensor, shape, name: str) -> Tensor:
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, got shape {tuple(tensor.shape)}") from None
