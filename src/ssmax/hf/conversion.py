"""convert and revert for Hugging Face models: which of their layers get a scale, and the content of config.ssmax."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ssmax.hf.checkpoint import auto_map, config_class, model_class, softmax_class
from ssmax.hf.layers import (
    FULL,
    language_layers,
    layers_of,
    named_layers,
    of_language,
    own_part_by_hand,
    part_by_hand,
    refuse_own_law,
)
from ssmax.hf.refusals import carries_scales
from ssmax.hf.scales import attach, detach
from ssmax.hf.spec import ScaleSpec
from ssmax.laws import LAWS, make_scale, matched_start
from ssmax.modules.conversion import Options
from ssmax.nn import starting_values
from ssmax.versions import __version__


def convert(model: PreTrainedModel, options: Options) -> None:
    """Convert a softmax model to SSMax, in place: its class and config become those of an SSMax model (model_type "ssmax_...").

    Raises:
        ValueError: the model is converted already; its family cannot be converted: its attention does
            not use the interface, it has a law of n already, or it adds a bias to the logits; or an option does not fit.
    """
    if options.example is not None:
        raise ValueError("example is for modules that are not transformers models; leave it out")
    if carries_scales(type(model)):
        raise ValueError(
            f"{type(model).__name__} is converted already; ssmax.revert(model) gives back the softmax model"
        )
    part = next((name for name, module in model.named_modules() if getattr(module, "ssmax", None) is not None), None)
    if part is not None:
        raise ValueError(
            f"{part} has a scale already: a part of {type(model).__name__}, or a model around it, was converted. Call "
            "ssmax.revert on the model that was converted"
        )
    config: Any = model.config
    base = type(model)
    declared: Any = base.config_class
    if base.__module__.startswith("transformers.") and type(config).model_type != declared.model_type:
        raise ValueError(
            f"the config is of model type {type(config).model_type!r} and the class {base.__name__} has {declared.model_type!r}; "
            f"a saved SSMax model could not say both. Build the model from a {declared.__name__}"
        )
    chosen = _chosen_layers(model, options.layers, options.cross)
    available = layers_of(model, chosen)
    inside = set(model.base_model.modules())
    for key in chosen:
        refuse_own_law(available[key].module, type(config).model_type)
        if available[key].module not in inside:
            raise ValueError(
                f"{key} is not a part of the base model of {base.__name__}, and what is saved could not be loaded by its own code; name "
                "layers of the base model in layers=[...]"
            )
    kinds = [available[key].kind if isinstance(key, int) else "named" for key in chosen]
    law: dict[str, Any] = (
        _learned_scales(options, config) if options.law == "ssmax" else _other_law(options, config, kinds)
    )
    spec = ScaleSpec(layers=chosen, version=__version__, **law)
    before = {name: config.__dict__[name] for name in REVERTED if name in config.__dict__}
    config = _own_config(model, config_class(type(config)))
    config.ssmax = spec.held()
    if auto_map(base):
        config.auto_map = auto_map(base)
    else:
        config.__dict__.pop("auto_map", None)  # code that makes the unconverted class
    config.architectures = [model_class(base).__name__]
    model.__dict__["_ssmax_reverts_to"] = before
    model.__class__ = model_class(base)
    attach(model)


def revert(model: PreTrainedModel) -> None:
    """Remove SSMax, in place: the class, config and state_dict are those of the softmax model, bit for bit.

    Raises:
        ValueError: the model is not converted.
    """
    if not carries_scales(type(model)):
        raise ValueError(f"{type(model).__name__} is not a converted model")
    detach(model)
    config = _own_config(model, type(model.config).__bases__[0])
    for part in model.modules():  # a head that was loaded is made around a converted model
        if carries_scales(type(part)):
            part.__class__ = softmax_class(type(part))
    before = model.__dict__.pop("_ssmax_reverts_to", {"architectures": [type(model).__name__]})  # as loaded
    for name in ("ssmax", *REVERTED):
        config.__dict__.pop(name, None)
    config.__dict__.update(before)


def _own_config(model: PreTrainedModel, kind: type[PreTrainedConfig]) -> Any:
    """Give the model and its parts a copy of its config, of the class kind, and return it; other models may share the old one."""
    old, new = model.config, kind.__new__(kind)
    new.__dict__.update(old.__dict__)
    for module in model.modules():
        mine = {name: value for name, value in vars(module).items() if type(value) is type(old)}
        # A part may hold an equal copy.
        vars(module).update({name: new for name, value in mine.items() if value is old or vars(value) == vars(old)})
    return new


REVERTED = ("architectures", "auto_map", "model_file")  # what convert or saving changes in a config beside adding ssmax


def _train_length(given, config):
    # The text config's own, where it is part of a larger one.
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) if given is None else given


CONVERTED_LAWS = tuple(name for name in LAWS if not LAWS[name].instead)


def _learned_scales(options, config):
    """Return the fields of config.ssmax for law "ssmax"."""
    if options.law_parameters:
        raise ValueError("law 'ssmax' takes init and bias, not law_parameters")
    values = starting_values(options.init, options.bias, _train_length(options.train_length, config))
    return {"law": "ssmax", "init": options.init, **values}


def _other_law(options, config, kinds):
    """Return the fields of config.ssmax for another law. Their parameters are the law's defaults; a training length is the model's."""
    law = options.law
    if law not in CONVERTED_LAWS:
        instead = f", for which convert takes {LAWS[law].instead}" if law in LAWS else ""
        raise ValueError(f"law must be {', '.join(CONVERTED_LAWS)}; got {law!r}{instead}")
    if options.init != "matched" or options.bias is not None:
        learns = LAWS[law].learned or LAWS[law].of == "query"
        instead = "starts from law_parameters" if learns else "learns nothing"
        raise ValueError(f"law {law!r} {instead}; init and bias belong to law 'ssmax'")
    if LAWS[law].of == "p" and set(kinds) != {FULL}:
        raise ValueError(
            f"law {law!r} needs each query's position, which layers with a window and layers that are not causal do not give; leave "
            "these layers out"
        )
    parameters = {**LAWS[law].defaults}
    length = _train_length(options.train_length, config)
    parameters |= {name: length for name in ("train_length", "length") if name in parameters and length is not None}
    parameters |= options.law_parameters
    unset = {"s": 1.0} if "s" in parameters and parameters["s"] is None else {}
    make_scale(law, 1, 1, **parameters | unset)  # raises where they do not fit
    if unset:
        starting_values("matched", None, length)  # raises without a length
        others = {name: value for name, value in parameters.items() if name != "s"}
        parameters["s"] = matched_start(law, int(length or 0), **others)
    return {"law": law, "parameters": parameters}


def _chosen_layers(model, layers, cross):
    """Return the layers to convert: indices in a decoder-only language model, else names. Raise ValueError if one is unknown."""
    if layers is None:
        return _default_layers(model, cross)
    if not layers or not all(isinstance(layer, str) for layer in layers):
        try:
            available = language_layers(model)
        except ValueError as reason:
            names = ", ".join(named_layers(model))
            raise ValueError(f"{reason}; its layers have names: {names}" if names else str(reason)) from None
        chosen = sorted(set(layers)) if all(type(layer) is int for layer in layers) else layers
    else:
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        available, chosen = named_layers(model), list(dict.fromkeys(layer.removeprefix(prefix) for layer in layers))
    if not chosen or any(layer not in available for layer in chosen):
        raise ValueError(f"layers must be some of {sorted(available)}, got {layers}")
    return chosen


def _default_layers(model, cross):
    named = named_layers(model)
    crossing = [name for name, layer in named.items() if layer.cross] if cross else []
    try:
        available: dict[Any, Any] = {**language_layers(model)}
    except ValueError as reason:
        available = {name: layer for name, layer in named.items() if not layer.cross}
        available = {name: layer for name, layer in available.items() if of_language(model, layer)} or available
        by_hand = part_by_hand(model)
        if not available or by_hand:
            part = f"; {by_hand} does not pass through transformers' attention interface" if available else ""
            hint = f"{part}. Parts of a model are converted by name, layers=[...]" if named else ""
            raise ValueError(f"{reason}{hint}") from None
        for layer in available.values():
            refuse_own_law(layer.module, type(model.config).model_type)
    own = own_part_by_hand(model)
    if own:
        raise ValueError(
            f"{own} attends without transformers' attention interface and would stay softmax; let its forward call what "
            "ALL_ATTENTION_FUNCTIONS.get_interface gives, or name what is to be converted in layers=[...]"
        )
    full = [key for key, layer in available.items() if layer.kind == FULL]
    if not full:
        kinds = sorted({layer.kind for layer in available.values()})
        raise ValueError(
            f"no layer attends in full, all are {', '.join(kinds)}; name some in layers=[...] to convert them"
        )
    return sorted(full) + crossing if isinstance(full[0], int) else full + crossing
