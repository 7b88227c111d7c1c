"""The one door of transformers' attention: whoever passes it with a scale gets its query scaled."""

import functools
from collections.abc import Callable

from transformers.modeling_utils import AttentionInterface

from ssmax.hf.visibility import kernel_visible_keys

__all__ = ["install"]


def _attend(attend: Callable, implementation: str, module, query, key, value, attention_mask, *args, **kwargs):
    scale = getattr(module, "ssmax", None)
    if scale is not None:
        query = scale(query, kernel_visible_keys(implementation, module, query, key, attention_mask, kwargs))
    return attend(module, query, key, value, attention_mask, *args, **kwargs)


def install() -> None:
    """Wrap the dispatch of every attention interface, once; modules without a scale pass through unchanged.

    The implementation's own name stays in the config: a model under a name of ours would lose its masks and SSMax
    itself as soon as anybody chooses another implementation.
    """
    original = AttentionInterface.get_interface
    if getattr(original, "_ssmax", False):
        return

    @functools.wraps(original)
    def get_interface(self, attn_implementation, default):
        return functools.partial(_attend, original(self, attn_implementation, default), attn_implementation)

    get_interface.__dict__["_ssmax"] = True
    AttentionInterface.get_interface = get_interface
