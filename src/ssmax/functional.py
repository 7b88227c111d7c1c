"""attention(): check the arguments, count n, choose a backend, call it."""

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ssmax.arguments import check_flag, check_plain, is_readable, whole_number
from ssmax.backends import flex, reference, sdpa, triton
from ssmax.backends.call import AttentionCall, Backend
from ssmax.scaling import head_multiplier, log_of
from ssmax.sharp import decode
from ssmax.sharp.keys import ScreenedKeys
from ssmax.visible import as_bool, check_offsets, count_blocks, rows_of, visible_keys

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# impl="auto" takes the first of these that can compute the call.
AUTO = ("sdpa", "reference", "flex")
BACKENDS: dict[str, Backend] = {"reference": reference, "sdpa": sdpa, "flex": flex, "triton": triton, "sharp": decode}


def attention(
    query: Tensor,
    key: Tensor | ScreenedKeys,
    value: Tensor,
    s: Tensor | float,
    b: Tensor | float | None = None,
    *,
    n: Tensor | int | None = None,
    attn_mask: "Tensor | BlockMask | None" = None,
    cu_seqlens: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    impl: str = "auto",
    tolerance: float = 1e-3,
) -> Tensor:
    """Scalable-Softmax attention: softmax((s log n + b) z) value, with z = softcap(scale query key) (arXiv 2501.19399).

    Args:
        query: (B, H, N, D).
        key: (B, H, S, D); with enable_gqa (B, K, S, D), where K divides H. Or a ScreenedKeys, for
            impl="sharp".
        value: (B, H or K, S, V).
        s: scale, a number or (H,).
        b: bias, a number or (H,). None is 0.
        n: number of keys that each query sees: a number, (N,), (B, N) or (B, H, N). Default:
            counted from attn_mask, cu_seqlens, is_causal and window. A row with n = 0 gives zeros.
        attn_mask: broadcasts to (B, H, N, S). bool: True = visible. Floating point: added after the
            multiplier; if it holds other values than 0 and -inf it is a bias, and needs n and the
            query's dtype. Or FlexAttention's BlockMask.
        cu_seqlens: (D + 1,), integer offsets of D packed documents, from 0, as in FlashAttention.
            query, key and value are (1, ., T, .), and a query sees its own document only. Documents
            may be empty. Positions after the last offset are padding: they are not seen and give
            zeros. Not with attn_mask.
        is_causal: the queries are the last N of the S positions, as in FlashAttention and a cached
            decode (torch aligns them with the first). Combines with attn_mask.
        window: largest number of keys that a query sees, itself included. Needs is_causal.
        softcap: c, for c tanh(z / c). It is part of z, so that the multiplier is applied after it.
        scale: factor of query key. Default: 1 / sqrt(D).
        dropout_p: probability of dropping a weight.
        enable_gqa: allow fewer heads in key and value than in query.
        impl: the backend. "auto": sdpa if it can, flex for a BlockMask, reference for a softcap.
            "sdpa": torch's fused kernels; packed documents run one by one, which reads cu_seqlens
            on the host (under torch.compile: one T x T mask). "flex": FlexAttention, with block
            masks and softcap; no dropout, on the CPU forward only. "triton": a kernel that does not
            round the scaled query and has accurate gradients of s and b; no mask, softcap or
            dropout; it needs a GPU and has not run on one yet. "sharp": a decode step on the CPU
            that reads only the keys that matter; inference only. "reference": the specification;
            slow, exact, N x S.
        tolerance: for impl="sharp", the weight that may be left out of a row. The error of each
            component is then at most 2 tolerance max|value|, certified, plus the rounding of any
            kernel.

    Returns:
        (B, H, N, V) in the query's dtype. The multiplier is float32 (float64 for float64); the
        scaled query is rounded once.

    Raises:
        TypeError: tensors that are not floating point, or have different dtypes.
        ValueError: shapes that do not fit, an unknown impl, or an impl that cannot compute this.

    Example:
        >>> query, key, value = torch.randn(3, 1, 8, 256, 64)
        >>> ssmax.attention(query, key, value, s=0.2, is_causal=True).shape
        torch.Size([1, 8, 256, 64])
    """
    if impl not in ("auto", *BACKENDS):
        raise ValueError(f"impl must be one of 'auto', {', '.join(map(repr, BACKENDS))}; got {impl!r}")
    screen, key = (key, key.keys) if isinstance(key, ScreenedKeys) else (None, key)
    _check_tensors(query, key, value, enable_gqa)
    window = None if window is None else whole_number(window, "window", 1)
    _check_options(query, key, attn_mask, is_causal, window, softcap, scale, dropout_p)
    if cu_seqlens is not None:
        _check_packed(query, key, cu_seqlens, attn_mask)
    empty = 0 in (query.shape[2], key.shape[2])
    n = 0 if empty and n is None else n
    if isinstance(attn_mask, Tensor):
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
        # Without n a floating mask must be a mask and no bias: bool is exact in every dtype.
        attn_mask = as_bool(attn_mask) if n is None else attn_mask
    if n is None and attn_mask is None and cu_seqlens is None:
        log_n, blind = _log_n(query, key.shape[2], is_causal, window), None
    else:
        counted = _visible_keys(query, key, attn_mask, cu_seqlens, is_causal, window) if n is None else n
        n_BHN = rows_of(counted, query)
        log_n, blind = log_of(n_BHN, query), n_BHN[..., None] <= 0
        query = query.masked_fill(blind, 0.0)  # a row that sees nothing must pass on no value
    call = AttentionCall(
        query,
        key,
        value,
        head_multiplier(log_n, s, b, query),
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        attn_mask,
        cu_seqlens,
        is_causal,
        window,
        None if softcap is None else float(softcap),
        float(dropout_p),
        tolerance,
        screen,
    )
    backend = _choose(impl, call)
    if empty:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    output = backend.forward(call)
    output = output if output.dtype == query.dtype else output.to(query.dtype)  # under autocast a kernel has its dtype
    # A counted n is 0 only in rows whose mask hides all keys, and backends return zeros there.
    return output if blind is None or n is None else output.masked_fill(blind, 0.0)


def _log_n(query, num_keys, is_causal, window):
    """Return log n without a mask: (1, 1, N), or a number if all rows see equally many keys."""
    num_queries = query.shape[2]
    if not is_causal or num_queries == 1:
        n = num_keys if window is None else min(num_keys, window)
        # torch.full takes a symbolic size; a plain number would be compiled again for each value.
        return (
            log_of(torch.full((1, 1, 1), n, device=query.device), query)
            if torch.compiler.is_compiling()
            else math.log(n)
        )
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        n = torch.arange(num_keys - num_queries + 1, num_keys + 1, device=query.device)
        return log_of(n if window is None else n.clamp(max=window), query)[None, None]
    wide = np.float64 if query.dtype == torch.float64 else np.float32
    return torch.from_numpy(_causal_logs(num_queries, num_keys, window, wide))


@functools.lru_cache(maxsize=4)
def _causal_logs(num_queries, num_keys, window, wide):
    """Return log n of a causal sequence. It is cached for the layers of a model, since small operations cost 30 us each."""
    n = np.arange(num_keys - num_queries + 1, num_keys + 1).clip(1, window)
    return np.log(n).astype(wide)[None, None]


def _visible_keys(query, key, attn_mask, cu_seqlens, is_causal, window):
    num_queries, num_keys = query.shape[2], key.shape[2]
    if cu_seqlens is not None:
        return visible_keys(cu_seqlens=cu_seqlens, num_queries=num_queries, window=window, causal=is_causal)
    if not isinstance(attn_mask, Tensor):
        return count_blocks(attn_mask)
    mask = attn_mask
    if mask.shape[1:3] == (1, 1) and not is_causal:  # one row of keys for all queries, as in cross attention
        return visible_keys(mask=mask.expand(-1, -1, -1, num_keys))
    if is_causal and mask.shape[1:3] == (1, 1):  # a padding mask: counted without an N x S table
        padding = mask[:, 0, 0].expand(-1, num_keys)
        blind = max(0, num_queries - num_keys)
        n = visible_keys(mask=padding, window=window, num_queries=num_queries - blind)
        return torch.nn.functional.pad(n, (blind, 0))
    if is_causal:
        open_keys = torch.ones(num_queries, num_keys, dtype=torch.bool, device=mask.device)
        open_keys = open_keys.tril(num_keys - num_queries)
        if window is not None:
            open_keys = open_keys.triu(num_keys - num_queries - window + 1)
        mask = mask & open_keys
    return visible_keys(mask=mask.expand(-1, -1, num_queries, num_keys))


def _choose(impl: str, call: AttentionCall) -> Backend:
    """Return the backend for a call. Raise ValueError, with its reason, if the chosen one cannot compute the call exactly."""
    refused = ""
    for name in AUTO if impl == "auto" else (impl,):
        reason = BACKENDS[name].why_not(call)
        if reason is None:
            return BACKENDS[name]
        refused = f"impl={name!r} {reason}"
    raise ValueError(refused)


def _check_tensors(query, key, value, enable_gqa):
    check_flag(enable_gqa, "enable_gqa")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head size), got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        check_plain(tensor, name, query.device)
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, but query has {query.dtype}")
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} has batch size {tensor.shape[0]}, but query has {query.shape[0]}")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(
            f"key and value must agree in heads and length, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[-1] == 0:
        raise ValueError("query has head size 0")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has head size {key.shape[-1]}, but query has {query.shape[-1]}")
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads and not enable_gqa:
        raise ValueError(f"query has {heads} heads and key {key_heads}; set enable_gqa=True if they are grouped")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"key's {key_heads} heads must divide query's {heads} heads")


def _check_options(query, key, attn_mask, is_causal, window, softcap, scale, dropout_p):
    check_flag(is_causal, "is_causal")
    if window is not None and not is_causal:
        raise ValueError("window needs is_causal=True; for a two-sided window pass attn_mask")
    for name, number in (("softcap", softcap), ("scale", scale), ("dropout_p", dropout_p)):
        if not isinstance(number, (int, float, np.floating)) and (number is not None or name == "dropout_p"):
            raise TypeError(f"{name} must be a number, got {type(number).__name__}")
        if number is not None and not -math.inf < number < math.inf:  # math.isfinite takes no symbolic number
            raise ValueError(f"{name} must be finite, got {number!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
    if attn_mask is None:
        return
    wanted = (*query.shape[:3], key.shape[2])
    if not isinstance(attn_mask, Tensor):
        _check_block_mask(attn_mask, wanted, is_causal)
        return
    check_plain(attn_mask, "attn_mask", query.device)
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or floating point, got {attn_mask.dtype}")
    fits = attn_mask.ndim <= 4 and all(
        have == 1 or have == want for have, want in zip(reversed(attn_mask.shape), reversed(wanted), strict=False)
    )
    if not fits:
        raise ValueError(f"attn_mask must broadcast to (B, H, N, S) = {wanted}, got {tuple(attn_mask.shape)}")


def _check_packed(query, key, cu_seqlens, attn_mask):
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if attn_mask is not None:
        raise ValueError("cu_seqlens and attn_mask both say what is visible; pass one of them")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            "cu_seqlens packs documents in one row: query and key must be (1, heads, T, head size), "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    check_offsets(cu_seqlens)
    if is_readable(cu_seqlens) and cu_seqlens[-1] > query.shape[2]:
        raise ValueError(f"cu_seqlens ends at {cu_seqlens[-1]}, but only {query.shape[2]} tokens are packed")


def _check_block_mask(attn_mask, wanted, is_causal):
    if not hasattr(attn_mask, "mask_mod"):
        raise TypeError(f"attn_mask must be a tensor or a BlockMask, got {type(attn_mask).__name__}")
    if is_causal:
        raise ValueError(
            "a BlockMask says all that is visible; put causality and window into it and leave is_causal out"
        )
    shape = tuple(attn_mask.shape)
    if shape[2:] != wanted[2:] or any(
        have != 1 and have != want for have, want in zip(shape[:2], wanted[:2], strict=True)
    ):
        raise ValueError(f"the BlockMask must be for (B or 1, H or 1, N, S) = {wanted}, got {shape}")
