"""The pieces of modeling_ssmax.py. They need nothing but torch and transformers; code_file.py copies those that a model needs.

The constants stand here for the checks of this file; in a saved model they are that model's own.
"""

import functools
import inspect
import pathlib
import threading

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

LAW = {"bias": True}
SCALES = {f"layers.{i}.self_attn": 4 for i in range(2)}
START = {"s": 0.5, "b": 1.0}
LAST = threading.local()  # of this thread: used, the last scale, and checked, the last attention that used its own


def multiplier(n, **learned):
    """The law of n of this model."""
    return torch.log(n)


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


class LawScale(Learned):
    """Multiplies each query by a law of n and of numbers per head that are learned; they stay float32."""

    def __init__(self, heads):
        super().__init__()
        for name in START:
            self.register_parameter(name, nn.Parameter(torch.empty(heads, dtype=torch.float32)))
        self.reset_parameters()

    def reset_parameters(self):
        """Set what is learned to what a new model starts with."""
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, START[name])

    def forward(self, query, n, log_n=None):
        """Return the scaled query, rounded once to its dtype."""
        learned = {name: parameter.view(-1, 1, 1) for name, parameter in self.named_parameters()}
        if any(len(parameter) != query.shape[1] for parameter in learned.values()):
            raise ValueError(f"the scale's heads are not the query's {query.shape[1]}: it was sharded")
        return (query * multiplier(wide(n, query), **learned)).to(query.dtype)


class QueryAwareScale(Learned):
    """Multiplies each component of the query by MLP(log n) (1 + tanh(MLP(q))), in float32."""

    def __init__(self, sizes):
        super().__init__()
        self.heads, self.head_size, hidden = sizes
        self.of_n, self.of_query = (
            nn.Sequential(
                nn.Linear(inputs, hidden, dtype=torch.float32),
                nn.GELU(),
                nn.Linear(hidden, outputs, dtype=torch.float32),
            )
            for inputs, outputs in ((1, self.heads * self.head_size), (self.head_size, self.head_size))
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Start from s log n + b: two hidden units hold log n, since GELU(x) - GELU(-x) = x."""
        for first, _, last in (self.of_n, self.of_query):
            first.reset_parameters()
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        first, _, last = self.of_n
        for unit, sign in enumerate((1.0, -1.0)):
            first.weight[unit].fill_(sign)
            first.bias[unit].fill_(0.0)
            last.weight[:, unit].fill_(sign * START["s"])
        last.bias.fill_(START["b"])

    def forward(self, query, n, log_n=None):
        """Return the scaled query, rounded once to its dtype."""
        if query.shape[1] != self.heads:
            raise ValueError(f"the scale has {self.heads} heads, the query {query.shape[1]}: it was sharded")
        kind = query.device.type
        with torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):
            log_n = wide(n, query).log()
            x, gelu = query.to(log_n.dtype), nn.functional.gelu
            first, last = ([part.to(x.dtype) for part in layer.parameters()] for layer in self.of_n[::2])
            weight = last[0].unflatten(0, (self.heads, self.head_size)).transpose(1, 2)
            base = gelu(nn.functional.linear(log_n, *first)) @ weight + last[1].view(self.heads, 1, self.head_size)
            first, last = ([part.to(x.dtype) for part in layer.parameters()] for layer in self.of_query[::2])
            gate = 1 + nn.functional.linear(gelu(nn.functional.linear(x, *first)), *last).tanh()
            return (x * (base * gate)).to(query.dtype)


class FixedScale(nn.Module):
    """Multiplies each query by the law of n, which has nothing to learn."""

    def __init__(self, heads):
        super().__init__()

    def reset_parameters(self):
        """There are none."""

    def forward(self, query, n, log_n=None):
        """Return the scaled query, rounded once to its dtype."""
        return (query * multiplier(wide(n, query))).to(query.dtype)


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


def attend(kernel, implementation, module, query, key, value, attention_mask, *args, **kwargs):
    """Call an attention kernel, the query scaled where the module has a scale."""
    scale = getattr(module, "ssmax", None)
    if scale is not None:  # of whichever checkpoint, or of the package: all are called alike
        given = [name for name in ("softcap", "position_bias") if kwargs.get(name) is not None]
        if given:
            raise ValueError(f"attention with {given[0]} is not SSMax where the query carries the scale")
        query = scale(query, visible_keys(implementation, module, query, key, attention_mask, kwargs))
    elif getattr(module, "ssmax_layer", None) is not None:
        raise ValueError(f"{module.ssmax_layer} had a scale of SSMax, which is gone: it would be plain softmax")
    return kernel(module, query, key, value, attention_mask, *args, **kwargs)


def note(scale, inputs, output):
    """Hook of a scale: record that it was used."""
    LAST.used = scale


def require(module, inputs, output):
    """Hook of attention: raise ValueError if this forward did not use its scale."""
    used, LAST.used, layer = getattr(LAST, "used", None), None, getattr(module, "ssmax_layer", None)
    scale = getattr(module, "ssmax", None)
    if layer is not None and (scale is None or all(used is not part for part in scale.modules())):  # PEFT wraps scales
        raise ValueError(f"the forward of {layer} was replaced and did not use its SSMax scale: it was plain softmax")
    LAST.checked = module


def require_inside(module, inputs, output):
    """Hook of the module around attention: raise ValueError if this forward did not call the attention inside."""
    checked, LAST.checked = getattr(LAST, "checked", None), None
    inside = [part for part in module.children() if getattr(part, "ssmax_layer", None) is not None]
    if all(part is not checked for part in inside):
        layer = inside[0].ssmax_layer if inside else "an attention module"
        raise ValueError(
            f"the forward around {layer} was replaced and did not use its SSMax scale: it was plain softmax"
        )


def carry(model, inputs):
    """Hook of the model: raise ValueError if a module with a scale was replaced by one without."""
    for name in SCALES:
        try:
            part = model.base_model.get_submodule(name)
        except AttributeError:  # a layer that was left out
            continue
        if getattr(part, "ssmax_layer", None) is None:
            raise ValueError(f"{name} was replaced by a module without a scale of SSMax: it would be plain softmax")


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
        recipe = getattr(config, "ssmax", None)
        recipe = {**recipe, **(recipe.get("parameters") or {})} if isinstance(recipe, dict) else {}
        if not LAW.items() <= recipe.items():
            raise ValueError(f"this code computes {LAW}, and config.ssmax says otherwise: it is of another checkpoint")
        super().__init__(config, *args, **kwargs)
        lost = SCALES.keys() - {name for name, _ in self.base_model.named_modules()}
        if lost:
            raise ValueError(f"the checkpoint scales {min(lost)}, which this model lacks: its config was changed")
        # Some heads are made around a model that an Auto class made, which has its scales already.
        new = {n: h for n, h in SCALES.items() if not hasattr(self.base_model.get_submodule(n), "ssmax_layer")}
        for name, heads in new.items():
            attention = self.base_model.get_submodule(name)
            if "get_interface" not in inspect.unwrap(type(attention).forward).__code__.co_names:
                raise ValueError(
                    f"{name} does not pass through transformers' attention interface in this version of it"
                )
            attention.ssmax, attention.ssmax_layer = Scale(heads), name
            attention.ssmax.register_forward_hook(note)
            attention.register_forward_hook(require)
        for around in {name.rpartition(".")[0] for name in new}:
            self.base_model.get_submodule(around).register_forward_hook(require_inside)
        self.register_forward_pre_hook(carry)

    is_custom_code = classmethod(lambda cls: False)  # transformers does not initialize some buffers of custom code

    def _init_weights(self, module):
        if isinstance(module, Scale):
            if not all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
                module.reset_parameters()
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as transformers does. mlx-lm's file is not written again, and a seal is of the files that were there before."""
        self.config.__dict__.pop("model_file", None)
        super().save_pretrained(save_directory, *args, **kwargs)
        pathlib.Path(save_directory, "seal.json").unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Load as transformers does, or raise ValueError where a scale is missing or does not fit."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        lost = [str(key) for kind in kinds for key in info[kind] if ".ssmax." in str(key)]
        if lost:
            raise ValueError(f"the checkpoint's SSMax scales do not fit this model: {', '.join(sorted(lost)[:4])} ...")
        return (model, info) if output_loading_info else model
