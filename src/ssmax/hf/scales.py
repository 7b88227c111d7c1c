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
from ssmax.private import drop_child, drop_hook, get_inside, saved_name, set_hook
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
    names = [name for name, _ in carriers(model)]
    model.__dict__["_ssmax_carriers"] = [tuple(name.split(".")) for name in names]
    model.__dict__["_ssmax_unscaled"] = {place: _unscaled(model, *place) for place in _lists(names)}
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
        """Return whether a forward may skip all watched layers: by layerdrop, by ending earlier, or because they were removed."""
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
    for name in ("_ssmax_carriers", "_ssmax_unscaled"):
        model.__dict__.pop(name, None)
    for module in model.modules():
        drop_child(module, "ssmax")
        module.__dict__.pop("ssmax_layer", None)
        drop_hook(module, "ssmax")


def carriers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """Return the attention modules that have a scale, with their names."""
    return [(name, module) for name, module in model.named_modules() if getattr(module, "ssmax", None) is not None]


def _lists(names):
    """Return the lists of layers that hold these attentions: the path of each list, and an attention's path within a layer."""
    found = {}
    for path in (tuple(name.split(".")) for name in names):
        first = next((i for i, part in enumerate(path) if part.isdigit()), None)
        if first is not None:
            found[path[:first], path[first + 1 :]] = None
    return list(found)


def _unscaled(model, layers, path):
    """Return how many layers of a list have an attention at this path without a scale."""
    found, depth = get_inside(model, layers)
    ends = [get_inside(layer, path) for layer in found.children()] if depth == len(layers) else []
    return sum(end == len(path) and not _scaled(module) for module, end in ends)


def _scaled(module):
    return get_inside(module, ("ssmax",))[1] == 1


def _is_lost(model, path):
    """Return whether the attention at this path has no scale. Layers and whole parts may be removed, and layers wrapped."""
    module, depth = get_inside(model, path)
    if depth == len(path):
        return not _scaled(module)
    if path[depth].isdigit() or not any(part.isdigit() for part in path[:depth]):  # removed
        return False
    return next(module.parameters(), None) is not None and not any(map(_scaled, module.modules()))


def check_carried(model: PreTrainedModel) -> None:
    """Raise ValueError if a converted attention, or a layer around one, was replaced, or a layer was added without a scale."""
    for path in model.__dict__.get("_ssmax_carriers", ()):
        if _is_lost(model, path):
            raise ValueError(
                f"{'.'.join(path)} was converted to SSMax and its scale is gone: it would be plain softmax"
            )
    for (layers, path), count in model.__dict__.get("_ssmax_unscaled", {}).items():
        if _unscaled(model, layers, path) > count:
            raise ValueError(
                f"a layer of {'.'.join(layers)} was added or replaced after the conversion, and has no scale: it would be plain softmax. "
                "Call ssmax.revert(model), and convert the model with its new layers"
            )


def check_whole(model: PreTrainedModel, state_dict: dict[str, Any] | None = None) -> None:
    """Raise ValueError if a model, or its state_dict, lacks a scale that config.ssmax names."""
    found, named = carriers(model), model.config.ssmax["layers"]
    layers = layers_of(model, named)
    lost = [key for key in named if key not in layers or getattr(layers[key].module, "ssmax", None) is None]
    if lost or len(found) != len(named):
        raise ValueError(
            f"config.ssmax names scales in layers {named}, and the model has {len(found)}, none in {lost}; convert the model again"
        )
    check_carried(model)
    if state_dict is None:
        return
    for name, module in ((saved_name(name), module) for name, module in found):
        if any(f"{name}.ssmax.{key}" not in state_dict for key, _ in module.ssmax.named_parameters()):
            raise ValueError(f"the state_dict lacks the SSMax scale of {name}; what is saved could not be loaded again")


def refuse_split_heads(model: PreTrainedModel) -> None:
    """Raise ValueError if the ranks of tensor parallelism cannot share the heads evenly."""
    ranks, _ = private.tensor_parallel(model)
    if ranks == 1:
        return
    heads = {layer.heads for layer in layers_of(model, model.config.ssmax["layers"]).values()}
    heads.add(getattr(model.config.get_text_config(decoder=True), "num_key_value_heads", None) or ranks)
    uneven = sorted(n for n in heads if n % ranks)
    if any(isinstance(module.ssmax, QueryAwareScale) for _, module in carriers(model)):
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
