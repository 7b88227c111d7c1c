"""The definition: the multiplier s log n + b, and Scalable-Softmax itself (arXiv 2501.19399). ssmax.visible counts n."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmax.arguments import as_count, check_plain, moved


def matched_scale(train_length: int) -> float:
    """Return the s at which SSMax is on average as sharp as softmax over the training length.

    s = 1 / mean(log n) over n = 1 to train_length, a number without unit. The paper starts there.

    Args:
        train_length: context length of the training, in tokens.

    Raises:
        ValueError: train_length is below 2, where log n is always zero.

    Example:
        >>> ssmax.matched_scale(1024)
        0.168...
    """
    if train_length < 2:
        raise ValueError(f"train_length must be at least 2, since log 1 = 0 and no scale can match; got {train_length}")
    return train_length / math.lgamma(train_length + 1)


def multiplier(n: Tensor, s: Tensor | float, b: Tensor | float | None = None, *, dtype: torch.dtype) -> Tensor:
    """Return s log n + b, computed in at least float32.

    Args:
        n: number of visible keys, any real dtype. n = 0 counts as 1: such a row has no weight to
            sharpen.
        s: scale, broadcast against n.
        b: bias, broadcast against n.
        dtype: float64 if the query is float64, else float32; nothing narrower, since log n in
            bfloat16 is wrong by 8e-3.
    """
    m = torch.as_tensor(s, dtype=dtype, device=n.device) * n.clamp(min=1).to(dtype).log()
    return m if b is None else m + torch.as_tensor(b, dtype=dtype, device=n.device)


def head_multiplier(log_n: Tensor | float, s: Tensor | float, b: Tensor | float | None, query: Tensor) -> Tensor:
    """Return the multiplier of each query row: (B or 1, H or 1, N or 1), float32 (float64 for a float64 query).

    Args:
        log_n: a number, or (B or 1, H or 1, N or 1); see log_of.
        s: a number, (), (1,) or (H,).
        b: as s, or None.
        query: (B, H, N, D).

    Raises:
        ValueError: s or b does not have such a shape.
    """
    # Each small operation counts beside a kernel of a few milliseconds, so that numbers stay Python's as long as they can.
    if isinstance(log_n, float) and not isinstance(s, Tensor) and not isinstance(b, Tensor):
        m = _finite(s, "s") * log_n + (0.0 if b is None else _finite(b, "b"))
        return torch.full((1, 1, 1), m, dtype=_wide(query), device=query.device)
    m_BHN = _per_head(s, query, "s") * log_n
    return m_BHN if b is None else m_BHN + _per_head(b, query, "b")


def log_of(n: Tensor, query: Tensor) -> Tensor:
    """Return log n, float32 (float64 for a float64 query). n = 0 counts as 1: nothing to sharpen."""
    return n.clamp(min=1).to(_wide(query)).log()


def log_visible(n_BHN: Tensor, query: Tensor) -> Tensor:
    """Return log n as it multiplies the query, (B or 1, H or 1, N or 1, 1); float32 (float64 for a float64 query).

    Args:
        n_BHN: as rows_of returns it. n = 0 counts as 1.
        query: (B, H, N, D).
    """
    return log_of(n_BHN[..., None], query)


def _per_head(value: Tensor | float, query: Tensor, name: str) -> Any:
    """(H or 1, 1) of a tensor, in the multiplier's dtype; a number as it is."""
    if not isinstance(value, Tensor):
        return _finite(value, name)
    heads, value = query.shape[1], moved(value, name, query.device).to(_wide(query))
    if value.shape not in ((), (1,), (heads,)):
        raise ValueError(f"{name} must be a number or one value for each of {heads} heads, got {tuple(value.shape)}")
    return value.reshape(-1, 1)


def _wide(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def scale_query(query: Tensor, m: Tensor) -> Tensor:
    """Multiply each query row by m: in m's dtype, rounded once to the query's.

    Args:
        query: (B, H, N, D).
        m: (B or 1, H or 1, N), float32 or float64.
    """
    scaled = query * m.unsqueeze(-1)
    return scaled if scaled.dtype == query.dtype else scaled.to(query.dtype)


def scalable_softmax(
    z: Tensor,
    s: Tensor | float = 1.0,
    b: Tensor | float = 0.0,
    *,
    n: Tensor | int | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Return the Scalable-Softmax of logits z along dim: softmax((s log n + b) z), Eq. 2 of arXiv 2501.19399.

    Args:
        z: logits, any shape, floating point. An entry of -inf is not visible.
        s: scale; a number, or a tensor that broadcasts to z's shape with dim reduced to 1.
        b: bias, as s.
        n: number of visible entries, as s. Default: counted along dim.
        mask: bool, True = visible, broadcast to z.
        dim: the dimension that sums to 1.

    Returns:
        Weights of z's shape and dtype, computed in float32 (float64 for float64). A row with no
        visible entry, or with n = 0, is all zeros and passes no gradient.

    Raises:
        TypeError: z is not floating point, or mask is not bool.
        ValueError: mask, n, s or b does not broadcast, or n is negative.

    Example:
        >>> ssmax.scalable_softmax(torch.tensor([2.0, 1.0, 1.0]), s=1.0)  # n = 3: softmax of log 3 z
        tensor([0.6000, 0.2000, 0.2000])
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
    wide = _wide(z)
    n_row = visible.sum(dim, keepdim=True) if n is None else _broadcast(as_count(n, z.device), row, "n")
    s_row, b_row = (_broadcast(_real(x, name, wide, z.device), row, name) for x, name in ((s, "s"), (b, "b")))
    scaled = z.to(wide).masked_fill(~visible, 0.0) * multiplier(n_row, s_row, b_row, dtype=wide)
    alive = visible.any(dim, keepdim=True) & (n_row > 0)
    # Dead rows get finite logits first and zeros after, so that no NaN reaches the gradient.
    weights = scaled.masked_fill(~visible & alive, -math.inf).softmax(dim)
    return weights.masked_fill(~(visible & alive), 0.0).to(z.dtype)


def _real(value: Tensor | float, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return moved(value, name, device)
    return torch.full((), _finite(value, name), dtype=dtype, device=device)


def _finite(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a tensor or a number, got {type(value).__name__}")
    if not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _broadcast(tensor: Tensor, shape, name: str) -> Tensor:
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, got shape {tuple(tensor.shape)}") from None
