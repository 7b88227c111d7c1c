"""convert, revert, converted: put SSMax into a Hugging Face model in place, and take it out again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

import ssmax
from ssmax.hf.checkpoint import SSMaxModel, attach, auto_map, config_class, model_class
from ssmax.hf.layers import FULL, language_layers
from ssmax.laws import LAWS, LawScale
from ssmax.modules.whole import whole_or_not_at_all
from ssmax.scaling import matched_scale

__all__ = ["convert", "converted", "revert"]


@whole_or_not_at_all()
def convert(
    model: PreTrainedModel,
    init: str | float = "matched",
    *,
    train_length: int | None = None,
    bias: bool | None = None,
    layers: list[int] | None = None,
    law: str = "ssmax",
    law_parameters: dict[str, float] | None = None,
) -> PreTrainedModel:
    """Turn a Softmax model into an SSMax model, in place: softmax((s log n + b) z) in each chosen layer.

    Args:
        model: a transformers model. Each converted attention module gets a submodule ssmax (an SSMaxScale).
        init: "matched": s = matched_scale(train_length) and no bias, the paper's start, on average as sharp as before;
            "identity": s = 0 and b = 1, exactly the same model, and it can learn; or a number for s.
        train_length: what "matched" is matched to; default the config's max_position_embeddings.
        bias: learn b as well; default as init says.
        layers: indices of the layers, whatever their kind; default every layer that attends in full. Cross and vision
            layers are never converted.
        law: "ssmax", or one of ssmax.laws that has nothing to learn: "ssmax-fixed" (log n), "qwen-1", "yarn", "llama-4",
            "ministral-3"; then init and bias have no meaning. The last two are laws of the position and do not go into
            windowed layers. The learned laws of production are "ssmax" too: OLMo's is init=1.0, Mistral Large 4's "identity".
        law_parameters: of such a law; the training length defaults to train_length or the config's.

    Returns:
        The same model. Its class and config become the saved kind (model_type "ssmax_..."), its weights stay.

    Raises:
        TypeError: not a transformers model.
        ValueError: already converted; a family that cannot be converted (an attention of its own, a law of n of its
            own, an encoder-decoder), with the reason; or an argument that does not fit.

    The training optimiser must not decay s and b (they are vectors; the paper decays matrices only).
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"convert needs a transformers PreTrainedModel, got {type(model).__name__}")
    if isinstance(model, SSMaxModel):
        raise ValueError(
            f"{type(model).__name__} is converted already; ssmax.revert(model) gives back the softmax model"
        )
    config: Any = model.config
    base = type(model)
    if getattr(transformers, base.__name__, None) is not base:
        raise ValueError(
            f"{base.__name__} is not a class of transformers itself; its checkpoints could not be loaded again"
        )
    available = language_layers(model)
    chosen = _chosen_layers(available, layers)
    if law == "ssmax":
        if law_parameters:
            raise ValueError("law 'ssmax' takes init and bias, not law_parameters")
        recipe = {
            "law": "s log n" if not _has_bias(init, bias) else "s log n + b",
            "init": init,
            **_start(init, bias, train_length, config),
        }
    else:
        if init != "matched" or bias is not None:
            raise ValueError(f"law {law!r} learns nothing; init and bias belong to law 'ssmax'")
        kinds = [available[index].kind for index in chosen]
        recipe = {"law": law, "parameters": _law_parameters(law, law_parameters or {}, kinds, train_length, config)}
    recipe |= {"layers": chosen, "version": ssmax.__version__}
    before = {name: config.__dict__[name] for name in REVERTED if name in config.__dict__}
    config = _own_config(model, config_class(type(config)))
    config.ssmax = recipe
    config.auto_map = auto_map(base)
    config.architectures = [model_class(base).__name__]
    model.__dict__["_ssmax_reverts_to"] = before
    model.__class__ = model_class(base)
    attach(model)
    return model


@whole_or_not_at_all()
def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Take SSMax out again, in place: the softmax model's class, config and state_dict, bit for bit.

    Raises:
        ValueError: the model is not converted.
    """
    if not isinstance(model, SSMaxModel):
        raise ValueError(f"{type(model).__name__} is not a converted model")
    for layer in language_layers(model).values():
        if hasattr(layer.module, "ssmax"):
            del layer.module.ssmax
    config = _own_config(model, type(model.config).__bases__[0])
    model.__class__ = type(model).__bases__[1]
    before = model.__dict__.pop("_ssmax_reverts_to", {"architectures": [type(model).__name__]})  # as loaded
    for name in ("ssmax", *REVERTED):
        config.__dict__.pop(name, None)
    config.__dict__.update(before)
    return model


def _own_config(model: PreTrainedModel, kind: type[PreTrainedConfig]) -> Any:
    """Give the model a copy of its config, of the class kind, and return it; other models may share the old one."""
    old, new = model.config, kind.__new__(kind)
    new.__dict__.update(old.__dict__)
    for module in model.modules():
        vars(module).update({name: new for name, value in vars(module).items() if value is old})
    return new


@contextmanager
def converted(model: PreTrainedModel, init: str | float = "matched", **options: Any) -> Iterator[PreTrainedModel]:
    """Convert on entry, revert on exit; arguments as ssmax.convert."""
    convert(model, init, **options)
    try:
        yield model
    finally:
        revert(model)


REVERTED = ("architectures", "auto_map")  # what convert changes in a config beside adding ssmax


def _has_bias(init, bias):
    return init == "identity" if bias is None else bias


def _start(init, bias, train_length, config):
    if init == "identity":
        if bias is False:
            raise ValueError("init='identity' is s = 0 and b = 1; bias=False contradicts it")
        return {"s": 0.0, "b": 1.0, "bias": True}
    if init == "matched":
        length = _train_length(train_length, config)
        if length is None:
            raise ValueError("init='matched' needs train_length: the config has no max_position_embeddings")
        return {"s": matched_scale(length), "b": 0.0, "bias": _has_bias(init, bias)}
    if isinstance(init, bool) or not isinstance(init, (int, float)):
        raise ValueError(f"init must be 'matched', 'identity' or a number, got {init!r}")
    return {"s": float(init), "b": 0.0, "bias": _has_bias(init, bias)}


def _train_length(given, config):
    # The text config's own, where it is part of a larger one.
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) if given is None else given


FIXED_LAWS = ("ssmax-fixed", "qwen-1", "yarn", "llama-4", "ministral-3")


def _law_parameters(law, given, kinds, train_length, config):
    """All parameters of a fixed law, those of the training length from the config; ValueError where one is missing."""
    if law not in FIXED_LAWS:
        raise ValueError(f"law must be ssmax, {', '.join(FIXED_LAWS)}; got {law!r}")
    if LAWS[law].of == "p" and set(kinds) != {FULL}:
        raise ValueError(f"law {law!r} is one of the position, which a windowed layer does not know; leave those out")
    parameters = {**LAWS[law].defaults}
    length = _train_length(train_length, config)
    parameters |= {name: length for name in ("train_length", "length") if name in parameters and length is not None}
    parameters |= given
    LawScale(law, **parameters)
    return parameters


def _chosen_layers(available, layers):
    if layers is None:
        full = sorted(index for index, layer in available.items() if layer.kind == FULL)
        if not full:
            kinds = sorted({layer.kind for layer in available.values()})
            raise ValueError(
                f"no layer attends in full, all are {', '.join(kinds)}; name some in layers=[...] to convert them"
            )
        return full
    chosen = sorted(set(layers))
    unknown = [layer for layer in chosen if layer not in available]
    if unknown or not chosen:
        raise ValueError(f"layers must be some of {sorted(available)}, got {layers}")
    return chosen
