"""The scales of a converted model: made from config.ssmax, listed, and checked for missing ones."""

import functools
import math
import re
from typing import Any

from transformers import PreTrainedModel

from ssmax.hf import private
from ssmax.hf.layers import computing_device, layers_of
from ssmax.hf.spec import ScaleSpec
from ssmax.laws import QueryAwareScale
from ssmax.modules import attended
from ssmax.private import drop_child
from ssmax.query_scale import QueryScale

__all__ = [
    "attach",
    "carriers",
    "check_attended",
    "check_carried",
    "check_whole",
    "detach",
    "refuse_split_heads",
    "shard_by_heads",
]


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
        attended.watch(module)
    model.__dict__["_ssmax_carriers"] = [name for name, _ in carriers(model)]


def detach(model: PreTrainedModel) -> None:
    """Remove what attach added."""
    model.__dict__.pop("_ssmax_carriers", None)
    for module in model.modules():
        drop_child(module, "ssmax")
        module.__dict__.pop("ssmax_layer", None)
        attended.unwatch(module)


def carriers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """Return the attention modules that have a scale, with their names."""
    return [(name, module) for name, module in model.named_modules() if getattr(module, "ssmax", None) is not None]


def check_carried(model: PreTrainedModel) -> None:
    """Raise ValueError if a converted attention was replaced by a plain one. Layers may be removed from a model."""
    for name in model.__dict__.get("_ssmax_carriers", ()):
        try:
            module = functools.reduce(getattr, name.split("."), model)
        except AttributeError:
            continue
        if getattr(module, "ssmax", None) is None:
            raise ValueError(f"{name} was converted to SSMax and its scale is gone: it would be plain softmax")


def check_attended(model: PreTrainedModel) -> None:
    """Raise ValueError if no scale was used in a forward: other code attended in place of the layers.

    Of a model that has parts, such as an encoder and a decoder, not all run in each forward; it is
    checked by its modules alone.
    """
    if "_ssmax_carriers" not in model.__dict__:  # reverted; a hook of accelerate still calls the converted forward
        return
    config, layers = model.config.get_text_config(decoder=True), model.config.ssmax["layers"]
    drops = model.training and any(value for name, value in vars(config).items() if "layerdrop" in name)
    parts = getattr(model.config, "is_encoder_decoder", False) or type(model.config).sub_configs
    depth = getattr(config, "num_hidden_layers", math.inf)  # lower during an early exit
    run = [key for key in layers if (key < depth if isinstance(key, int) else not parts)]
    if run and not drops and not attended.noticed_any():
        raise ValueError(
            f"layers {layers} were converted to SSMax, and none of them used its scale in this forward, which was plain softmax. Did a "
            "library replace the forward around them? Undo that, or call ssmax.revert(model)"
        )


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
