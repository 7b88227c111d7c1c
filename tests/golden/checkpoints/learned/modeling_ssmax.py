"""Llama with Scalable-Softmax (arXiv 2501.19399): queries are multiplied by s log n; n is how many keys a query sees.

Needs transformers 5.10 or later and nothing else. Where the package ssmax is installed, that is used instead.
"""

import functools
import inspect

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

# What config.ssmax says of the law that is computed here, and the attention modules that are scaled: how many heads each has.
LAW = {'bias': False}
SCALES = {f"layers.{i}.self_attn": 2 for i in range(1, 2)}
# What a new model starts with; a checkpoint brings its own.
START = {'s': 0.5}


class Learned(nn.Module):
    """A scale whose parameters stay float32."""

    def _apply(self, fn, recurse=True):
        def keep_float32(tensor):
            moved = fn(tensor)
            return moved if moved.dtype in (torch.float32, torch.float64) else tensor.to(moved.device, torch.float32)

        return super()._apply(keep_float32, recurse)


class Scale(Learned):
    """Multiplies each query by s log n + b. s (weight) and b (bias) are numbers per head; they stay float32."""

    def __init__(self, heads):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(heads, dtype=torch.float32)) if "b" in START else None
        self.reset_parameters()

    def reset_parameters(self):
        """Set s and b to what a new model starts with."""
        nn.init.constant_(self.weight, START["s"])
        if self.bias is not None:
            nn.init.constant_(self.bias, START["b"])

    def forward(self, query, n, log_n=None):
        """Return the scaled query, rounded once to its dtype."""
        if self.weight.numel() not in (1, query.shape[1]):
            raise ValueError(f"SSMax has {self.weight.numel()} heads, the query {query.shape[1]}: it was sharded")
        m = self.weight.view(-1, 1, 1) * (wide(n, query).log() if log_n is None else log_n)
        return (query * (m if self.bias is None else m + self.bias.view(-1, 1, 1))).to(query.dtype)


def wide(n, query):
    """n as it multiplies a query (B, H, N, D): float32, no less than 1."""
    n = (n[:, None] if n.ndim == 2 else n)[..., None].to(query.device)
    return n.clamp(min=1).to(torch.float64 if query.dtype == torch.float64 else torch.float32)


def visible_keys(implementation, module, query, key, mask, kwargs):
    """n, the number of keys that each query sees, (B or 1, N) or (B, H, N), from what the attention kernel is given."""
    kind = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation.removeprefix("paged|"))
    queries, keys = query.shape[2], key.shape[2]
    window, positions = kwargs.get("sliding_window"), kwargs.get("position_ids")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if implementation == "vllm":  # its cache is paged: only the position says how many keys there are
        kinds = getattr(module.config, "layer_types", None)
        if positions is None or positions.ndim != 2 or not causal or (kinds and "chunked" in kinds[module.layer_idx]):
            raise ValueError("SSMax in vLLM needs causal attention and plain positions, one number for each token")
        return positions + 1 if window is None else (positions + 1).clamp(max=window)
    if kind is sdpa_mask or kind is eager_mask:
        if mask is not None:
            hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
            readable = mask.device.type == "cpu" and not torch.compiler.is_compiling()
            if mask.dtype != torch.bool and readable and mask.masked_fill(hidden, 0).any():
                raise ValueError("SSMax cannot count the keys of a mask that is a bias, neither 0 nor -inf")
            return (~hidden).sum(-1)
        if kind is sdpa_mask and causal and queries > 1:
            return torch.arange(1, queries + 1, device=query.device)[None]
        return torch.full((1, queries), keys, device=query.device)
    if kind is flash_attention_mask and causal and mask is None and kwargs.get("cu_seq_lens_k") is None:
        n = torch.arange(keys - queries + 1, keys + 1, device=query.device)[None]
        if positions is not None and queries == keys and query.shape[0] == 1:  # packed documents start at position 0
            n = n - torch.where(positions == 0, n - 1, 0).cummax(-1).values
        return n if window is None else n.clamp(max=window)
    raise ValueError(
        f"this model's own code cannot count the keys of attention implementation {implementation!r} here (padding, packing or a "
        "mask of its own); use attn_implementation='sdpa', or install the package ssmax"
    )


def attend(kernel, implementation, module, query, key, value, mask, *args, **kwargs):
    """Call an attention kernel, the query scaled where the module has a scale."""
    scale = getattr(module, "ssmax", None)
    if scale is not None:  # of whichever checkpoint, or of the package: all are called alike
        given = [name for name in ("softcap", "position_bias") if kwargs.get(name) is not None]
        if given:
            raise ValueError(f"attention with {given[0]} is not SSMax where the query carries the scale")
        query = scale(query, visible_keys(implementation, module, query, key, mask, kwargs))
    return kernel(module, query, key, value, mask, *args, **kwargs)


def install():
    """Lead transformers' attention through attend, once in a process; the package ssmax takes it over where it comes."""
    if hasattr(AttentionInterface, "_ssmax_attend"):
        return
    original = AttentionInterface.get_interface

    @functools.wraps(original)
    def get_interface(self, implementation, default):
        kernel = original(self, implementation, default)
        return functools.partial(AttentionInterface._ssmax_attend, kernel, implementation)

    AttentionInterface._ssmax_attend = staticmethod(attend)
    AttentionInterface.get_interface = get_interface


class Converted:
    """A transformers model whose attention modules in SCALES have a scale, and that loads no checkpoint without them."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._keep_in_fp32_modules_strict = [*(cls._keep_in_fp32_modules_strict or []), "ssmax"]

    def __init__(self, config, *args, **kwargs):
        recipe = getattr(config, "ssmax", {})
        if not LAW.items() <= {**recipe, **recipe.get("parameters", {})}.items():
            raise ValueError(f"this code computes {LAW}, and config.ssmax says otherwise: it is of another checkpoint")
        super().__init__(config, *args, **kwargs)
        for name, heads in SCALES.items():
            attention = self.base_model.get_submodule(name)
            if "get_interface" not in inspect.unwrap(type(attention).forward).__code__.co_names:
                raise ValueError(
                    f"{name} does not pass through transformers' attention interface in this version of it"
                )
            attention.ssmax = Scale(heads)

    def _init_weights(self, module):
        if isinstance(module, Scale):
            if not all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
                module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Load as transformers does, or raise ValueError where a scale is missing or does not fit."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        lost = [str(key) for kind in kinds for key in info[kind] if ".ssmax." in str(key)]
        if lost:
            raise ValueError(f"the checkpoint's SSMax scales do not fit this model: {', '.join(sorted(lost)[:4])} ...")
        return (model, info) if output_loading_info else model


try:  # the same model, on more attention implementations
    from ssmax.hf.checkpoint import (
        SSMaxLlamaConfig,
        SSMaxLlamaForCausalLM,
        SSMaxLlamaForQuestionAnswering,
        SSMaxLlamaForSequenceClassification,
        SSMaxLlamaForTokenClassification,
        SSMaxLlamaModel,
    )
except ImportError:
    install()

    class SSMaxLlamaConfig(LlamaConfig):
        model_type = "ssmax_llama"

    class SSMaxLlamaForCausalLM(Converted, LlamaForCausalLM):
        config_class = SSMaxLlamaConfig

    class SSMaxLlamaForQuestionAnswering(Converted, LlamaForQuestionAnswering):
        config_class = SSMaxLlamaConfig

    class SSMaxLlamaForSequenceClassification(Converted, LlamaForSequenceClassification):
        config_class = SSMaxLlamaConfig

    class SSMaxLlamaForTokenClassification(Converted, LlamaForTokenClassification):
        config_class = SSMaxLlamaConfig

    class SSMaxLlamaModel(Converted, LlamaModel):
        config_class = SSMaxLlamaConfig

    # Where transformers builds one model inside of another, it looks the inner one up.
    AutoModel.register(SSMaxLlamaConfig, SSMaxLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(SSMaxLlamaConfig, SSMaxLlamaForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(SSMaxLlamaConfig, SSMaxLlamaForSequenceClassification, exist_ok=True)
    AutoModelForQuestionAnswering.register(SSMaxLlamaConfig, SSMaxLlamaForQuestionAnswering, exist_ok=True)
    AutoModelForTokenClassification.register(SSMaxLlamaConfig, SSMaxLlamaForTokenClassification, exist_ok=True)
    # Its server looks models up by name, in either of two objects that the module transformers may be.
    for kind in (
        SSMaxLlamaForCausalLM,
        SSMaxLlamaForQuestionAnswering,
        SSMaxLlamaForSequenceClassification,
        SSMaxLlamaForTokenClassification,
        SSMaxLlamaModel,
    ):
        setattr(type(transformers), kind.__name__, kind)
