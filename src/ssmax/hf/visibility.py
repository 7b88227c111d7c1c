"""n from the arguments that transformers hands to an attention kernel: exact by construction.

The rule follows the mask function registered for the implementation, since that decides what the mask means.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)

from ssmax.scaling import log_visible, visible_keys

__all__ = ["forward_scope", "kernel_visible_keys"]

# What this forward has counted already: layers share their masks. Holding the masks keeps their ids theirs.
_counted: ContextVar[dict[Any, tuple[Any, tuple[Tensor, Tensor]]] | None] = ContextVar("_counted", default=None)


@contextmanager
def forward_scope() -> Iterator[None]:
    """Count each mask once inside the block, which is one forward of a model; masks may change in place between two."""
    token = _counted.set({})
    try:
        yield
    finally:
        _counted.reset(token)


def kernel_visible_keys(
    implementation: str, module: torch.nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict
) -> tuple[Tensor, Tensor]:
    """Return n, the number of keys that each query of this kernel call sees, (B or 1, N) or (B, H, N), and log n.

    Args:
        implementation: the name in config._attn_implementation.
        module: the attention module.
        query: (B, H, N, D).
        key: (B, K, S, D), after the cache update.
        mask: as delivered to the kernel: a tensor, a BlockMask or None.
        kwargs: the kernel's further arguments.

    Raises:
        ValueError: an implementation that masks in an unknown way.
    """
    mask_function = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation.removeprefix("paged|"))
    rule = _RULES.get(mask_function)
    if rule is None:
        raise ValueError(
            f"SSMax does not know what the masks of attention implementation {implementation!r} mean; "
            "use 'sdpa' or 'eager' (attn_implementation=... in from_pretrained, or model.set_attn_implementation)"
        )
    counted = None if torch.compiler.is_compiling() else _counted.get()
    if counted is None:
        return _count(rule, module, query, key, mask, kwargs)
    parts = (mask, kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"), kwargs.get("position_ids"))
    name = (
        rule,
        *map(id, parts),
        query.shape[2],
        key.shape[2],
        query.device,
        query.dtype,
        kwargs.get("sliding_window"),
        _is_causal(module, kwargs),
    )
    if name not in counted:
        counted[name] = (parts, _count(rule, module, query, key, mask, kwargs))
    return counted[name][1]


def _count(rule, module, query, key, mask, kwargs):
    n = rule(module, query, key, mask, kwargs)
    return n, log_visible(n[:, None] if n.ndim == 2 else n, query)


def _is_causal(module, kwargs):
    given = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if given is None else given


def _sdpa(module, query, key, mask, kwargs):
    if mask is not None:
        return visible_keys(mask=mask)
    num_queries = query.shape[2]
    if num_queries > 1 and _is_causal(module, kwargs):
        # A whole sequence, or the prefill of an empty static cache whose tail is still unused.
        return torch.arange(1, num_queries + 1, device=query.device)[None]
    return _all_keys(query, key)


def _eager(module, query, key, mask, kwargs):
    return _all_keys(query, key) if mask is None else visible_keys(mask=mask)


def _flex(module, query, key, mask, kwargs):
    if mask is None or isinstance(mask, Tensor):
        return _eager(module, query, key, mask, kwargs)
    from ssmax.backends.flex import count_visible

    n_BHN = count_visible(mask)
    return n_BHN[:, 0] if n_BHN.shape[1] == 1 else n_BHN


def _flash(module, query, key, mask, kwargs):
    num_queries, num_keys = query.shape[2], key.shape[2]
    window, offsets = kwargs.get("sliding_window"), kwargs.get("cu_seq_lens_k")
    if not _is_causal(module, kwargs):
        return (
            visible_keys(mask=mask, num_queries=num_queries, causal=False)
            if mask is not None
            else _all_keys(query, key)
        )
    if offsets is not None:
        return _packed(kwargs["cu_seq_lens_q"].long(), offsets.long(), num_queries, window)
    if mask is not None:
        return visible_keys(mask=mask, num_queries=num_queries, window=window)
    position_ids = kwargs.get("position_ids")
    if position_ids is not None and num_queries == num_keys and query.shape[0] == 1:
        # Restarting positions pack documents; otherwise they are 0, 1, 2, ... and give the same n as no mask.
        return visible_keys(position_ids=position_ids - position_ids[..., :1], window=window)
    return visible_keys(num_keys=num_keys, num_queries=num_queries, window=window).to(query.device)


def _packed(ends_q, ends_k, num_queries, window):
    """Rows are packed queries; those of a document are the last of its keys."""
    row = torch.arange(num_queries, device=ends_q.device)
    document = torch.searchsorted(ends_q, row, right=True).clamp(max=ends_q.numel() - 1)
    keys = ends_k[document] - ends_k[(document - 1).clamp(min=0)]
    n = keys - (ends_q[document] - 1 - row)
    n = n if window is None else n.clamp(max=window)
    return torch.where(row < ends_q[-1], n, 0)[None]


def _all_keys(query, key):
    return torch.full((1, query.shape[2]), key.shape[2], device=query.device)


_RULES: dict[Any, Callable[..., Tensor]] = {
    sdpa_mask: _sdpa,
    eager_mask: _eager,
    flash_attention_mask: _flash,
    flex_attention_mask: _flex,
}
