"""The scales of a converted model: made from config.ssmax, listed, and checked for missing ones."""

import math
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ssmax.hf import private
from ssmax.hf.layers import computing_device, layers_of
from ssmax.hf.spec import ScaleSpec
from ssmax.laws import QueryAwareScale
from ssmax.modules.attended import Watch
from ssmax.private import drop_child, drop_hook, set_hook
from ssmax.query_scale import QueryScale


def attach(model: PreTrainedModel) -> None:
    """Give each layer that config.ssmax names its scale, with its starting values."""
    spec = ScaleSpec.of(model.config, type(model))
    layers = layers_of(model, spec.layers)
    unknown = [key for key in spec.layers if key not in layers]
    if unknown:
        raise ValueError(f"config.ssmax names layers {unknown}; {type(model).__name__} has {sorted(layers)}")
    try:
        scales = {index: _scale(model, spec, layers[index]) for index in spec.layers}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"config.ssmax describes no scales that fit ({type(error).__name__}: {error})") from error
    for index, scale in scales.items():
        module = layers[index].module
        module.ssmax, module.ssmax_layer = scale, index
    model.__dict__["_ssmax_carriers"] = [name for name, _ in carriers(model)]
    _watch(model, {layers[index].module: layers[index].cross for index in scales})


class StackWatch(Watch):
    """Watch of a module that runs a list of layers, such as an encoder.

    Args:
        first: index of the first layer inside that holds converted self-attention.
    """

    def __init__(self, first: int):
        super().__init__()
        self.first = first

    def excuses(self, module: Any) -> bool:
        """Return whether layers drop out in training, the forward may end before the first watched layer, or none is left."""
        config = getattr(module, "config", None)
        settings = {**vars(module), **(vars(config) if config is not None else {})}
        drops = module.training and any(value for name, value in settings.items() if "layerdrop" in name)
        if drops or getattr(config, "num_hidden_layers", math.inf) <= self.first:
            return True
        return not any(getattr(inner, "ssmax", None) is not None for inner in module.modules())


def _watch(model, attentions):
    """Watch each converted attention, and the modules around self-attention up to the one that runs the list of its layers.

    A layer runs its self-attention in each forward, and an encoder or decoder its layers. Around them nothing is watched, since
    parts may be left out: an encoder whose states are given, or a vision tower without pictures.
    """
    watches = {module: Watch(counts=not cross) for module, cross in attentions.items()}
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if first is None or attentions.get(module, True):
            continue
        inner = watches[module]
        for end in range(len(parts) - 1, first - 2, -1):
            around = model.get_submodule(".".join(parts[:end]))
            if isinstance(around, (nn.ModuleList, nn.ModuleDict)):  # these have no forward
                continue
            outer = watches.setdefault(around, StackWatch(int(parts[first])) if end < first else Watch())
            if not any(inner is one for one in outer.inside):
                outer.inside.append(inner)
            inner = outer
    for module, hook in watches.items():
        set_hook(module, "ssmax", hook)


def detach(model: PreTrainedModel) -> None:
    """Remove what attach added."""
    model.__dict__.pop("_ssmax_carriers", None)
    for module in model.modules():
        drop_child(module, "ssmax")
        module.__dict__.pop("ssmax_layer", None)
        drop_hook(module, "ssmax")


def carriers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """Return the attention modules that have a scale, with their names."""
    return [(name, module) for name, module in model.named_modules() if getattr(module, "ssmax", None) is not None]


def check_carried(model: PreTrainedModel) -> None:
    """Raise ValueError if a converted attention, or a layer around one, was replaced. Layers and whole parts may be removed."""
    for name in model.__dict__.get("_ssmax_carriers", ()):
        module, in_layer = model, False
        for part in name.split("."):
            module, in_layer = getattr(module, part, None), in_layer or part.isdigit()
            if module is None:
                break
        removed = module is None and (part.isdigit() or not in_layer)
        if not removed and getattr(module, "ssmax", None) is None:
            raise ValueError(f"{name} was converted to SSMax and its scale is gone: it would be plain softmax")


def check_whole(model: PreTrainedModel, state_dict: dict[str, Any] | None = None) -> None:
    """Raise ValueError if a model, or its state_dict, lacks a scale that config.ssmax names."""
    found, named = carriers(model), model.config.ssmax["layers"]
    layers = layers_of(model, named)
    lost = [key for key in named if getattr(layers[key].module, "ssmax", None) is None]
    if lost or len(found) != len(named):
        raise ValueError(
            f"config.ssmax names scales in layers {named}, and the model has {len(found)}, none in {lost}; convert it anew"
        )
    if state_dict is None:
        return
    for name, module in found:
        wanted = [key for key, _ in module.ssmax.named_parameters()]
        if wanted and not any(f"{name}.ssmax." in key for key in state_dict):
            raise ValueError(f"the state_dict lacks the SSMax scale of {name}; what is saved could not be loaded again")


def refuse_split_heads(model: PreTrainedModel) -> None:
    """Raise ValueError if the ranks of tensor parallelism cannot share the heads evenly."""
    ranks, _ = private.tensor_parallel(model)
    heads = {layer.heads for layer in layers_of(model, model.config.ssmax["layers"]).values()} if ranks > 1 else set()
    heads.add(getattr(model.config.get_text_config(decoder=True), "num_key_value_heads", None) or ranks)
    uneven = sorted(n for n in heads if n % ranks)
    if ranks > 1 and any(isinstance(module.ssmax, QueryAwareScale) for _, module in carriers(model)):
        raise ValueError(
            "tensor parallelism splits heads, which the networks of law 'query-aware' share; load it on one rank"
        )
    if uneven:
        raise ValueError(f"tensor parallelism over {ranks} ranks needs heads that they share evenly, got {uneven}")


def shard_by_heads(model: PreTrainedModel) -> None:
    """Add s and b to the tensor parallel plan of the model if it splits the query projection by heads."""
    _, plan = private.tensor_parallel(model)
    for name, module in list(model.named_modules()) if plan else ():
        scale = getattr(module, "ssmax", None)
        prefix = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        styles = {plan.get(f"{prefix}.{child}") for child, _ in module.named_children()}
        if isinstance(scale, QueryScale) and styles & {"colwise", "packed_colwise"}:
            plan.update({f"{prefix}.ssmax.{part}": "colwise" for part, _ in scale.named_parameters(recurse=False)})


def _scale(model, spec, layer):
    scale = spec.make(layer)
    scale.to_empty(device=computing_device(layer.module, model))
    scale.reset_parameters()
    return scale
