"""Attention of a chunk of positions after a cache, without a causal mask."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ssmax.private import flash_with_log_sum

# With fewer queries there is nothing to gain: the mask hides few of their keys.
FEWEST = 128


class CausalAfterCache(TorchFunctionMode):
    """Inside the block, scaled_dot_product_attention on a CPU computes a chunk after a cache without a mask.

    The kernel has a causal form only for equal numbers of queries and keys. After a cache it needs
    a T x S mask, and computes every pair. Here T queries attend to the S - T earlier keys without a
    mask, and to the T new keys causally. The two outputs are merged by the log-sum-exp of their
    logits, which gives the softmax over all keys.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace scaled_dot_product_attention if its mask is that of a causal chunk."""
        call = func if func is not scaled_dot_product_attention else _attend
        return call(*args, **(kwargs or {}))


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    num_queries, past = query.shape[-2], key.shape[-2] - query.shape[-2]
    if (
        query.device.type != "cpu"
        or (num_queries < FEWEST or past < 1)
        or (dropout_p > 0 or query.shape[-1] != value.shape[-1])
        or not (_is_causal(attn_mask, num_queries, past) and query.ndim == 4)
    ):
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    (earlier, of_earlier), (new, of_new) = (
        flash_with_log_sum(query, key[:, :, keys], value[:, :, keys], causal, scale)
        for keys, causal in ((slice(past), False), (slice(past, None), True))
    )
    return torch.lerp(new, earlier, torch.sigmoid(of_earlier - of_new).to(new.dtype)[..., None])


def _is_causal(mask, num_queries, past):
    if mask is None or mask.dtype != torch.bool or mask.shape[-2:] != (num_queries, past + num_queries):
        return False
    causal = torch.ones(num_queries, past + num_queries, dtype=torch.bool).tril(past)
    return bool((mask == causal).all())
