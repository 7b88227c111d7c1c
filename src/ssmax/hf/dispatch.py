"""Wraps transformers' attention functions, once: they scale the query of modules that have a scale."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.modeling_utils import AttentionInterface

from ssmax.backends import reference, sdpa
from ssmax.backends.call import AttentionCall
from ssmax.hf.visibility import kernel_visible_keys, sees_what_it_is_handed
from ssmax.modules import attended
from ssmax.query_scale import QueryAwareScale
from ssmax.sharp import decode
from ssmax.sharp.keys import MIN_KEYS
from ssmax.visible import as_bool

# Keys that a SharpCache returned -> their screen (None where decoding is plain) and its tolerance, while these keys live.
SCREENS = WeakTensorKeyDictionary()


def _attend(attend: Callable, implementation: str, module, query, key, value, attention_mask, *args, **kwargs):
    scale = getattr(module, "ssmax", None)
    if scale is None:
        if getattr(module, "ssmax_layer", None) is not None:  # which attach wrote there
            raise ValueError(
                f"layer {module.ssmax_layer} ({type(module).__name__}) was converted to SSMax and its scale is gone: it would be plain "
                "softmax. ssmax.revert(model) takes SSMax out of a model"
            )
        return attend(module, query, key, value, attention_mask, *args, **kwargs)
    attended.note(module)
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            "this model adds a position bias to its logits, for which SSMax is not defined; ssmax.revert(model) takes SSMax out of it"
        )
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
    scaled = scale(query, n, log_n)
    if _is_sharp_step(implementation, query, key, attention_mask, kwargs):
        return _decoded_sharply(scaled, key, value, attention_mask, kwargs.get("scaling"))
    return attend(module, scaled, key, value, attention_mask, *args, **kwargs)


def _is_sharp_step(implementation, query, key, mask, kwargs):
    return (
        not torch.compiler.is_compiling()  # torch.compile cannot trace the table
        and SCREENS
        and key in SCREENS
        and implementation == "sdpa"
        and query.shape[2] <= decode.MAX_QUERIES
        and key.shape[2] >= MIN_KEYS
        and (mask is not None or query.shape[2] == 1)
        and not torch.is_grad_enabled()
        and kwargs.get("sliding_window") is None
        and kwargs.get("s_aux") is None
    )


def _decoded_sharply(scaled, key, value, mask, scaling):
    screen, tolerance = SCREENS[key]
    scale = scaled.shape[-1] ** -0.5 if scaling is None else scaling
    mask = None if mask is None else as_bool(mask)
    call = AttentionCall(scaled, key, value, None, scale, mask=mask, tolerance=tolerance, screen=screen)
    forward = sdpa.forward if screen is None else decode.forward
    return forward(call).transpose(1, 2).contiguous(), None


def _softcapped(scale, n, query, key, value, mask, scaling, softcap, dropout=0.0, **kwargs):
    """Return softmax(m softcap(z)) v. The multiplier comes after the cap, so the query cannot carry it."""
    m = scale(torch.ones(*query.shape[:3], 1, dtype=torch.float32, device=query.device), n)[..., 0]
    output = reference.forward(
        AttentionCall(query, key, value, m, scaling, mask=mask, softcap=softcap, dropout_p=dropout)
    )
    return output.transpose(1, 2).contiguous(), None


def install() -> None:
    """Wrap the dispatch of every attention interface, once. Modules without a scale pass through unchanged.

    The implementation's own name stays in the config. Under a name of ours, a model would lose its
    masks, and SSMax itself as soon as somebody chose another implementation.
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
