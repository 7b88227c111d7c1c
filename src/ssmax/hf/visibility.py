"""Chooses the count of n for transformers: n is counted from the arguments that its attention kernel receives.

The mask function that is registered for an attention implementation decides what its masks mean, so
it decides the count too. ssmax.visible does the counting.
"""

import functools
import types
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
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from ssmax.arguments import is_readable
from ssmax.hf import private
from ssmax.scaling import log_visible
from ssmax.visible import (
    as_bool,
    count_at,
    count_blocks,
    count_packed,
    count_plain,
    count_range,
    count_unpadded,
    visible_keys,
)

# Counts of the present forward, since layers share their masks. The masks are kept, so that no id is used twice. The forward's
# position_ids are kept too, since some families do not pass them to their kernel.
_counted: ContextVar[dict[Any, tuple[Any, Any]] | None] = ContextVar("_counted", default=None)


@contextmanager
def forward_scope(position_ids: Any = None) -> Iterator[None]:
    """Count each mask once inside the block, which is one forward of a model. Between two forwards masks may change in place."""
    token = _counted.set({"position_ids": (position_ids, None)})
    try:
        yield
    finally:
        _counted.reset(token)


def kernel_visible_keys(
    implementation: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    kwargs: dict,
    closed: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return n, the number of keys that each query of this kernel call sees, (B or 1, N) or (B, H, N), and log n.

    Args:
        implementation: the name in config._attn_implementation.
        module: the attention module.
        query: (B, H, N, D).
        key: (B, K, S, D), after the cache update.
        mask: as the kernel receives it: a tensor, a BlockMask or None.
        kwargs: the kernel's other arguments.
        closed: the kernel sees the keys that it receives and no others; see sees_what_it_is_handed.

    Raises:
        ValueError: an implementation whose masks are unknown, or a split sequence whose n is not
            determined.
    """
    mask_function = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation.removeprefix("paged|"))
    rule = RULES.get(implementation, RULES.get(mask_function))
    if rule is None:
        raise ValueError(
            f"SSMax does not know what the masks of attention implementation {implementation!r} mean; "
            "use 'sdpa' or 'eager' (attn_implementation=... in from_pretrained, or model.set_attn_implementation)"
        )
    rule = rule if closed else functools.partial(_open, rule)
    counted = None if torch.compiler.is_compiling() else _counted.get()
    if counted is None:
        return _count(rule, module, query, key, mask, kwargs)
    parts = (mask, kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"), kwargs.get("position_ids"))
    name = (
        mask_function,
        closed,
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


def sees_what_it_is_handed(attend: Callable) -> bool:
    """Return whether a kernel sees only the keys that it receives: it is transformers' own code and calls torch's own kernel.

    Other functions may read the keys of other ranks: ring attention and Ulysses, under a name of
    theirs or of transformers, and torch's context_parallel, which replaces
    scaled_dot_product_attention.
    """
    while isinstance(attend, functools.partial):
        attend = attend.func
    inner = private.inner_flash(attend)
    return (
        all(f is None or getattr(f, "__module__", "").startswith("transformers.") for f in (attend, inner))
        and attend.__class__ is types.FunctionType
        and isinstance(torch.nn.functional.scaled_dot_product_attention, types.BuiltinFunctionType)
    )


def _open(rule, module, query, key, mask, kwargs):
    """Return n for a kernel that may see more keys than it receives. A position beyond its keys shows that it does.

    Then positions are global, each in the query's own document, and n is position + 1, at most the
    window.
    """
    n, position_ids = rule(module, query, key, mask, kwargs), kwargs.get("position_ids")
    if position_ids is None and not torch.compiler.is_compiling():
        position_ids = (_counted.get() or {}).get("position_ids", (None, None))[0]
    num_queries, num_keys = query.shape[2], key.shape[2]
    explained_by_a_cache = mask is not None and num_keys > num_queries  # one that rolls forgets keys
    offsets = kwargs.get("cu_seq_lens_q")
    if position_ids is None or tuple(position_ids.shape[1:]) != (num_queries,) or explained_by_a_cache:
        if offsets is not None and is_readable(offsets) and offsets[-1] > query.shape[0] * num_queries:
            raise ValueError(
                f"cu_seq_lens_q ends at {int(offsets[-1])}, but this rank holds {num_queries} queries; on a sequence that is "
                "split over ranks SSMax needs the global position_ids"
            )
        return n
    position = position_ids.to(query.device).long()
    split = (position > torch.arange(num_keys - num_queries, num_keys, device=query.device)).any()
    if is_readable(position):
        if not split:
            return n
        _check_split(module, position, mask, kwargs)
    return torch.where(split, count_at(position, kwargs.get("sliding_window")), n)


def _check_split(module, position_BN, mask, kwargs):
    """Raise ValueError unless positions alone say what a query of a split sequence sees."""
    if not _is_causal(module, kwargs):
        raise ValueError(
            "position_ids are those of a sequence that is split over ranks; how many keys there are in all is not known "
            "without causal attention, and SSMax needs it"
        )
    if not isinstance(mask, Tensor):
        return
    if mask.ndim == 4:  # transformers takes jumps of the positions for borders of documents
        jumps = position_BN.diff(dim=1, prepend=position_BN[:, :1] - 1) != 1
        document, row = jumps.cumsum(1), torch.arange(position_BN.shape[1], device=position_BN.device)
        gap = row[:, None] - row
        plain = (gap >= 0) & (gap < (kwargs.get("sliding_window") or len(row)))
        parted = plain & (document[:, :, None] == document[:, None])
        seen = as_bool(mask)
        if any(bool((seen == want).all()) for want in (parted[:, None], plain)):
            return
    elif as_bool(mask).all():
        return
    raise ValueError(
        "position_ids are those of a sequence that is split over ranks, and the attention mask covers the keys of this rank "
        "only, so that n is not known; leave attention_mask out, and let position_ids count real tokens from each document's start"
    )


def _sdpa(module, query, key, mask, kwargs):
    if mask is not None:
        return visible_keys(mask=mask)
    num_queries = query.shape[2]
    if num_queries > 1 and _is_causal(module, kwargs):
        # A whole sequence, or the prefill of an empty static cache whose tail is still unused.
        return count_plain(num_queries, num_queries, causal=True, device=query.device)[None]
    return _all_keys(query, key)


def _eager(module, query, key, mask, kwargs):
    return _all_keys(query, key) if mask is None else visible_keys(mask=mask)


def _flex(module, query, key, mask, kwargs):
    if mask is None or isinstance(mask, Tensor):
        return _eager(module, query, key, mask, kwargs)
    n_BHN = count_blocks(mask)
    return n_BHN[:, 0] if n_BHN.shape[1] == 1 else n_BHN


def _flash(module, query, key, mask, kwargs):
    """Return n as transformers' _flash_attention_forward reads these arguments, in its order of precedence."""
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    offsets = tuple(kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    lengths = (kwargs.get("max_length_q"), kwargs.get("max_length_k"))
    position_ids, cache, window = (kwargs.get(name) for name in ("position_ids", "cache", "sliding_window"))
    if window is not None and cache is None and num_keys <= window:
        window = None  # left out as if it hid nothing, which is not so where a document runs over several rows
    causal = _is_causal(module, kwargs)
    if cache is not None and isinstance(offsets[1], dict):  # pages of several kinds of layers
        windowed = "sliding_attention" if getattr(module, "sliding_window", None) else "full_attention"
        allocators = getattr(cache, "layer_to_allocator", None)  # transformers before 5.2x asks the module instead
        offsets = (offsets[0], offsets[1][windowed if allocators is None else allocators[module.layer_idx].layer_type])
    if mask is not None:
        return count_unpadded(as_bool(mask), num_queries, window, causal)
    if any(part is None for part in (*offsets, *(() if cache is not None else lengths))):
        if not private.is_packed_sequence(position_ids, batch):
            place = torch.arange(num_keys - num_queries, num_keys, device=query.device)
            return count_range(place, num_keys, window, causal)[None]
        offsets, _ = prepare_fa_kwargs_from_position_ids(position_ids)
    return count_packed(offsets[0], offsets[1], batch * num_queries, window, causal).view(batch, num_queries)


def _all_keys(query, key):
    return count_plain(query.shape[2], key.shape[2], causal=False, device=query.device)[None]


def _vllm(module, query, key, mask, kwargs):
    """Return n in vLLM from the position alone: its cache is paged, and prompts are batched and split."""
    positions = kwargs.get("position_ids")
    kinds = getattr(module.config, "layer_types", None)
    if (
        positions is None
        or positions.ndim != 2
        or not _is_causal(module, kwargs)
        or (kinds and "chunked" in kinds[module.layer_idx])
    ):
        raise ValueError("SSMax in vLLM needs causal attention and plain positions, one number for each token")
    return count_at(positions, kwargs.get("sliding_window"))


RULES: dict[Any, Callable[..., Tensor]] = {
    "vllm": _vllm,
    sdpa_mask: _sdpa,
    eager_mask: _eager,
    flash_attention_mask: _flash,
    flex_attention_mask: _flex,
}
