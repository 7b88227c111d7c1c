"""n from the arguments that transformers hands to an attention kernel: exact by construction.

The rule follows the mask function registered for the implementation, since that decides what the mask means.
"""

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from ssmax.scaling import visible_keys

__all__ = ["kernel_visible_keys"]


def kernel_visible_keys(
    implementation: str, module: torch.nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict
) -> Tensor:
    """Return the number of keys that each query of this kernel call sees: (B or 1, N) or (B, H, N).

    Args:
        implementation: the name in config._attn_implementation.
        module: the attention module.
        query: (B, H, N, D).
        key: (B, K, S, D), after the cache update.
        mask: as delivered to the kernel.
        kwargs: the kernel's further arguments.

    Raises:
        ValueError: the kernel gets something for which scaling the query is not SSMax, or masks in an unknown way.
    """
    for name in ("softcap", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} changes what scaling the query means; SSMax cannot be computed exactly here")
    mask_function = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
    if mask is not None and mask_function in (sdpa_mask, eager_mask):
        return visible_keys(mask=mask)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask_function is eager_mask:
        return _count(num_queries, num_keys, False, query.device)
    if mask_function is sdpa_mask:
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return _count(num_queries, num_keys, is_causal and num_queries > 1, query.device)
    raise ValueError(
        f"SSMax does not know what the masks of attention implementation {implementation!r} mean; "
        "use 'sdpa' or 'eager' (attn_implementation=... in from_pretrained, or model.set_attn_implementation)"
    )


def _count(num_queries, num_keys, is_causal, device):
    # Causal without a mask is a whole sequence, or the prefill of an empty static cache whose tail is still unused.
    seen = torch.arange(1, num_queries + 1, device=device) if is_causal else torch.tensor([num_keys], device=device)
    return seen.expand(1, num_queries)
