"""Wraps transformers' attention functions, once: they scale the query of modules that have a scale."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface

from ssmax.backends import reference
from ssmax.backends.call import AttentionCall
from ssmax.hf.visibility import kernel_visible_keys, sees_what_it_is_handed
from ssmax.query_scale import QueryAwareScale

__all__ = ["install"]


def _attend(attend: Callable, implementation: str, module, query, key, value, attention_mask, *args, **kwargs):
    scale = getattr(module, "ssmax", None)
    if scale is None:
        if getattr(module, "ssmax_layer", None) is not None:  # which attach wrote there
            raise ValueError(
                f"layer {module.ssmax_layer} ({type(module).__name__}) was converted to SSMax and its scale is gone: it would be plain "
                "softmax. ssmax.revert(model) takes SSMax out of a model"
            )
        return attend(module, query, key, value, attention_mask, *args, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise ValueError("this model adds a position bias to its logits; SSMax is not defined for it here")
    closed = implementation == "vllm" or sees_what_it_is_handed(attend)  # vLLM's n depends only on positions
    n, log_n = kernel_visible_keys(implementation, module, query, key, attention_mask, kwargs, closed)
    if kwargs.get("softcap") is not None:
        if implementation != "eager":
            raise ValueError(
                f"attention implementation {implementation!r} applies the softcap to scaled queries, which is not SSMax; "
                "use model.set_attn_implementation('eager')"
            )
        if isinstance(scale, QueryAwareScale):
            raise ValueError(
                "law 'query-aware' multiplies components of the query, which cannot come after a softcap; use 'ssmax'"
            )
        return _softcapped(scale, n, query, key, value, attention_mask, **kwargs)
    return attend(module, scale(query, n, log_n), key, value, attention_mask, *args, **kwargs)


def _softcapped(scale, n, query, key, value, mask, scaling, softcap, dropout=0.0, **kwargs):
    """Return softmax(m softcap(z)) v. The multiplier comes after the cap, so the query cannot carry it."""
    m = scale(torch.ones(*query.shape[:3], 1, dtype=torch.float32, device=query.device), n)[..., 0]
    output = reference.forward(
        AttentionCall(query, key, value, m, scaling, mask=mask, softcap=softcap, dropout_p=dropout)
    )
    return output.transpose(1, 2).contiguous(), None


def install() -> None:
    """Wrap the dispatch of every attention interface, once. Modules without a scale pass through unchanged.

    The implementation's own name stays in the config. Under a name of ours, a model would lose its masks, and SSMax itself as
    soon as somebody chose another implementation.
    """
    wrapped = hasattr(AttentionInterface, "_ssmax_attend")  # by the code file of a saved model, whose place ssmax takes
    AttentionInterface._ssmax_attend = staticmethod(_attend)  # pyrefly: ignore[missing-attribute]
    if wrapped:
        return
    original = AttentionInterface.get_interface

    @functools.wraps(original)
    def get_interface(self, attn_implementation, default):
        attend = original(self, attn_implementation, default)
        current: Any = AttentionInterface
        return functools.partial(current._ssmax_attend, attend, attn_implementation)

    AttentionInterface.get_interface = get_interface
