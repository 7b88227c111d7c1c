"""Finds the attention modules of a model that can carry SSMax, by what their code does and not by a list of names."""

import inspect
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ssmax.hf import private
from ssmax.modules.code import attends_itself, forward_calls_attention

FULL = "full_attention"
OTHER_KEYS = {"cross_attention_states", "encoder_hidden_states", "key_value_states"}
LIBRARIES = ("torch.", "transformers.")  # not the user's own code
# Layers with a recurrent part beside their attention, and the kind of that attention.
HYBRID = {"hybrid": FULL, "hybrid_sliding": "sliding_attention"}


# Names in the attention's code, or of its parameters, of a bias on its logits; dt_states make Doge's.
BIASES = re.compile(r"position_bias|relative_attention_bias\.|relative_k_proj|dt_states")


@dataclass(frozen=True)
class Layer:
    """One attention module.

    Attributes:
        module: its attention module.
        heads: query heads.
        kind: as in the config's layer_types: "full_attention", "sliding_attention",
            "chunked_attention" or a sparse kind.
        cross: whether keys and queries have different sources.
    """

    module: Any
    heads: int
    kind: str
    cross: bool = False

    @property
    def head_size(self) -> int:
        """Components of a query, by the module's attributes; 0 if it has no such attribute."""
        sizes = (
            getattr(self.module, name, None) for name in ("qk_head_dim", "head_dim", "attention_head_size", "head_size")
        )
        return next((size for size in sizes if isinstance(size, int)), 0)


def language_layers(model: PreTrainedModel) -> dict[int, Layer]:
    """Return the self-attention layers of the language model by layer index, without cross-attention and vision layers.

    Raises:
        ValueError: the family cannot be converted, with the reason.
    """
    family = model.config.model_type.removeprefix("ssmax_")
    if getattr(model.config, "is_encoder_decoder", False):
        if not any(_dispatches(module) for module in model.modules()):
            raise ValueError(f"no attention of {family} can be converted: {_reason(model)}")
        raise ValueError(f"{family} is an encoder-decoder model, whose layers have names and no indices")
    text_config = model.config.get_text_config(decoder=True)
    # The language model inside a larger one may see its prompt whole (PaliGemma), and is causal all the same.
    prompted = model.config is not text_config
    candidates: list[Any] = [
        module
        for module in model.modules()
        if _is_attention(module, type(text_config)) and (prompted or getattr(module, "is_causal", False) is True)
    ]
    dispatched = [module for module in candidates if _dispatches(module)]
    if not dispatched:
        raise ValueError(f"no causal self-attention of {family} can be converted: {_reason(model)}")
    layers: dict[int, Layer] = {}
    for module in dispatched:
        if module.layer_idx in layers:
            raise ValueError(
                f"{family} has several self-attention modules in layer {module.layer_idx}; it is not known which n belongs to which"
            )
        refuse_own_law(module, family)
        layers[module.layer_idx] = Layer(module, _heads(module), _kind(module, text_config))
    return layers


def named_layers(model: PreTrainedModel) -> dict[str, Layer]:
    """Return all attention modules that pass through transformers' attention interface, in every part of the model.

    Names are those in the base model, without its prefix, so that a model with a head and one
    without have the same.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if _dispatches(module):
            config = getattr(module, "config", model.config)
            layers[name.removeprefix(prefix)] = Layer(
                module, _heads(module), _kind(module, config), _is_cross(name, module)
            )
    return layers


def layers_of(model: PreTrainedModel, keys: Iterable[int | str]) -> dict[Any, Layer]:
    """Return the layers that config.ssmax can name: those of the language model by index if a key is an index, and all by name."""
    keys = list(keys)
    by_index: dict[Any, Layer] = {**language_layers(model)} if any(isinstance(key, int) for key in keys) else {}
    return by_index | (named_layers(model) if any(isinstance(key, str) for key in keys) else {})


def of_language(model: PreTrainedModel, layer: Layer) -> bool:
    """Return whether a layer belongs to the language model of a larger model."""
    text = model.config.get_text_config(decoder=True)
    return text is not model.config and _is_attention(layer.module, type(text))


def part_by_hand(model: PreTrainedModel) -> str | None:
    """Return the class of an attention module that does not use transformers' attention interface, or None."""
    for name, module in _undispatched(model):
        attends = "Attention" in type(module).__name__ and next(module.parameters(), None) is not None
        pools = any(isinstance(part, nn.MultiheadAttention) for part in module.modules())  # queries that are no tokens
        if attends and not pools and not _is_cross(name, module):
            return type(module).__name__
    return None


def own_part_by_hand(model: PreTrainedModel) -> str | None:
    """Return the name of a module that attends without the interface, by code that is not transformers' own, or None."""
    for name, module in _dispatching(model):
        kind = type(module)
        adapted = kind.__module__.startswith("peft.") and attends_itself(kind)  # an adaption prompt
        if adapted or forward_calls_attention(kind, LIBRARIES):
            return f"{name or 'the model'} ({kind.__name__})"
    for name, module in _undispatched(model):
        of_torch = isinstance(module, nn.MultiheadAttention)
        writer = model.get_submodule(name.rpartition(".")[0]) if of_torch else module
        own = not type(writer).__module__.startswith(LIBRARIES) and (of_torch or attends_itself(type(module)))
        if own or ("Attention" in type(module).__name__ and _is_patched(module)):
            return f"{name} ({type(module).__name__})"
    return None


def _dispatching(model):
    """Yield the modules, with names, that use the interface or hold one that does."""
    names = [name for name, module in model.named_modules() if _dispatches(module)]
    holders = {name[:end] for name in names for end in (0, *(i for i, x in enumerate(name) if x == "."), len(name))}
    for name, module in model.named_modules():
        if name in holders:
            yield name, module


def _undispatched(model):
    """Yield the modules, with names, that do not use the interface, and neither hold nor belong to one that does."""
    dispatched = [f"{name}." for name, module in model.named_modules() if _dispatches(module)]
    for name, module in model.named_modules():
        if name and not any(x.startswith(f"{name}.") or f"{name}.".startswith(x) for x in dispatched):
            yield name, module


def _is_cross(name, module):
    """Return whether a module is cross attention, by its attribute, its name, or an argument that it needs."""
    said = getattr(module, "is_cross_attention", None)
    if isinstance(said, bool):
        return said
    arguments = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    needed = any(arguments[name].default is inspect.Parameter.empty for name in OTHER_KEYS & set(arguments))
    return needed or bool(re.search(r"cross|encoder_attn|encdec", f"{name}.{type(module).__name__}", re.IGNORECASE))


def _reason(model):
    attention = {type(module): module for module in model.modules() if "Attention" in type(module).__name__}
    if not attention:
        return "it has no attention"
    names = ", ".join(sorted(kind.__name__ for kind in attention))
    if any(_dispatches(module) for module in attention.values()):
        return f"its attention ({names}) is not that of a causal decoder"
    return (
        f"its attention ({names}) does not pass through transformers' attention interface. Choose a family whose attention does, "
        "or call ssmax.attention in an attention of your own"
    )


def _is_attention(module, text_config_type):
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and type(getattr(module, "config", None)) is text_config_type
        and not getattr(module, "is_cross_attention", _takes_other_keys(module))
    )


def _takes_other_keys(module):
    """Return whether a module without is_cross_attention takes keys from elsewhere, by its arguments."""
    arguments = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    return bool(OTHER_KEYS & set(arguments))


def _is_patched(module):
    """Return whether an instance has another forward than its class. Hooks of accelerate wrap that of the class."""
    own, of_class = vars(module).get("forward"), inspect.unwrap(type(module).forward)
    return own is not None and getattr(inspect.unwrap(own), "__func__", inspect.unwrap(own)) is not of_class


def _dispatches(module):
    """Return whether a module's forward gets its kernel from transformers' attention interface."""
    for owner in (module, *type(module).__mro__):
        if "forward" not in vars(owner):
            continue
        code = getattr(inspect.unwrap(vars(owner)["forward"]), "__code__", None)
        names = () if code is None else code.co_names
        calls_base = "super" in names or any(base.__name__ in names for base in type(module).__mro__[1:])
        if not calls_base or "get_interface" in names:
            return "get_interface" in names
    return False


def _heads(module):
    for owner in (module, getattr(module, "config", None)):
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    raise ValueError(f"{type(module).__name__} does not say how many heads it has")


def _kind(module, text_config):
    kinds = getattr(text_config, "layer_types", None)
    if kinds is not None and isinstance(getattr(module, "layer_idx", None), int):
        return HYBRID.get(kinds[module.layer_idx], kinds[module.layer_idx])
    if getattr(module, "sliding_window", None) or getattr(text_config, "sliding_window", None):
        return "sliding_attention"
    return FULL


def refuse_own_law(module: Any, family: str) -> None:
    """Raise ValueError if SSMax is not defined for a module: it has another law of n, or adds a bias to its logits."""
    config = getattr(module, "config", None)
    # BEiT's layers hand their bias, which starts at zero, to the attention as its mask.
    switches = ("use_relative_position_bias", "use_shared_relative_position_bias")
    code = inspect.unwrap(type(module).forward).__code__
    names = [*code.co_names, *code.co_varnames, *(name for name, _ in module.named_parameters())]
    unused = getattr(module, "position_embeddings_type", "relative") in (None, "rotary")  # conformers
    if (
        (not unused and any(BIASES.search(name) for name in names))
        or any(getattr(config, name, False) for name in switches)
        or str(getattr(module, "position_embeddings_type", "")).startswith("relative")
    ):
        raise ValueError(
            f"{family} adds a bias to its logits ({type(module).__name__}), and SSMax does not define "
            "whether s log n multiplies it. Choose a family with RoPE or learned positions, or call ssmax.attention, which adds a float "
            "attn_mask after the multiplier, in an attention of your own"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    own = {
        "Llama 4's temperature tuning (attn_temperature_tuning)": getattr(module, "attn_temperature_tuning", False),
        "Ministral 3's scaling (llama_4_scaling_beta)": isinstance(rope, dict) and rope.get("llama_4_scaling_beta"),
        "Qwen 1's log n attention (use_logn_attn)": getattr(config, "use_logn_attn", False),
        "s log(position + 1) + b (its SoftmaxScaling modules)": any(
            type(child).__name__.endswith("SoftmaxScaling") for child in module.modules()
        ),
        "ssmax_scale parameters": any("ssmax_scale" in name for name, _ in module.named_parameters(recurse=False)),
    }
    found = [name for name, present in own.items() if present]
    if found:
        raise ValueError(
            f"{family} scales its queries by {found[0]} already, and SSMax would scale them a second time; choose a family without it"
        )


def computing_device(module: nn.Module, model: PreTrainedModel) -> torch.device:
    """Return the device on which an attention module computes, also if its weights are offloaded or quantised."""
    for hook in private.forward_hooks(
        module
    ):  # accelerate's: weights that are offloaded lie on the meta device until they are needed
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    for owner in (module, model):  # quantised projections may hold buffers only, or nothing that torch can see
        for tensor in itertools.chain(owner.parameters(), owner.buffers()):
            return tensor.device
    return torch.device("cpu")
