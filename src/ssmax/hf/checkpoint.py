"""Saved models: their own model_type, the recipe in config.ssmax, and a refusal of every checkpoint that lost its scale.

SSMaxLlamaForCausalLM, SSMaxLlamaConfig and the like are made on demand from transformers' class of that name, so that
they can be imported, pickled and named in auto_map.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import ssmax
from ssmax.hf.layers import computing_device, language_layers
from ssmax.hf.visibility import forward_scope
from ssmax.laws import LawScale
from ssmax.nn import SSMaxScale

__all__ = ["attach", "config_class", "model_class", "register"]

PREFIX = "SSMax"
CODE_FILE = "modeling_ssmax"
AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)


class SSMaxModel(PreTrainedModel):
    """What a converted model adds to its transformers class: scales built from config.ssmax, and a strict checkpoint."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        attach(self)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SSMaxScale):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as transformers does, from safetensors alone, and raise ValueError where a scale is missing or does not fit."""
        kwargs.setdefault("use_safetensors", True)  # a pickle would run code
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        lost = {
            kind: sorted(str(name) for name in info[kind] if ".ssmax." in str(name))
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        for kind, names in lost.items():
            if names:
                raise ValueError(
                    f"the checkpoint's SSMax scales do not fit its config.ssmax: {kind.replace('_', ' ')} "
                    f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}; it would compute something else"
                )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the file by which trust_remote_code finds this library."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            # Of the class, not of the config, which may come from anywhere and would become code.
            names = ", ".join(sorted(name.rsplit(".", 1)[1] for name in auto_map(type(self).__bases__[1]).values()))
            code = f"# Needs the package ssmax.\nfrom {__name__} import {names}\n"
            Path(save_directory, f"{CODE_FILE}.py").write_text(code)


@functools.cache
def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the config class of converted models whose own config class is base."""
    return type(f"{PREFIX}{base.__name__}", (base,), {"model_type": f"ssmax_{base.model_type}", "__module__": __name__})


@functools.cache
def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of converted models whose own class is base."""
    attributes = {
        "config_class": config_class(base.config_class),
        "_keep_in_fp32_modules_strict": [*(base._keep_in_fp32_modules_strict or []), "ssmax"],
        "forward": _scoped(base.forward),
        "__module__": __name__,
    }
    return type(f"{PREFIX}{base.__name__}", (SSMaxModel, base), attributes)


def attach(model: PreTrainedModel) -> None:
    """Give the layers named in config.ssmax their scale, at its starting value."""
    layers = language_layers(model)
    recipe = _checked_recipe(model, layers)
    try:
        scales = {index: _scale(model, recipe, layers[index]) for index in recipe["layers"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"config.ssmax describes no scales that fit ({type(error).__name__}: {error})") from error
    for index, scale in scales.items():
        module = layers[index].module
        module.ssmax = scale


def _scale(model, recipe, layer):
    if "s" not in recipe:
        return LawScale(recipe["law"], **recipe["parameters"])
    scale = SSMaxScale(layer.heads, recipe["s"], recipe["bias"], recipe["b"])
    scale.to_empty(device=computing_device(layer.module, model))
    scale.reset_parameters()
    return scale


def _checked_recipe(model, layers):
    """Return config.ssmax, or raise ValueError where it is missing or damaged."""
    recipe = getattr(model.config, "ssmax", None)
    if recipe is None:
        raise ValueError(
            f"config.ssmax is missing: {type(model).__name__} cannot know its scales; convert the model anew"
        )
    fields = {"law", "layers", "version", *(("s", "b", "bias") if "s" in recipe else ("parameters",))}
    if not isinstance(recipe, dict) or not fields <= set(recipe):
        raise ValueError(f"config.ssmax must hold {', '.join(sorted(fields))}; got {recipe!r}; convert the model anew")
    unknown = [index for index in recipe["layers"] if index not in layers]
    if unknown:
        raise ValueError(f"config.ssmax names layers {unknown}; {type(model).__name__} has {sorted(layers)}")
    return recipe


def _scoped(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def scoped(*args, **kwargs):
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with forward_scope():
            return forward(*args, **kwargs)

    return scoped


def auto_map(base: type[PreTrainedModel]) -> dict[str, str]:
    """Return config.auto_map of a converted model: which class of the code file serves which Auto class."""
    entries = {"AutoConfig": config_class(base.config_class).__name__}
    for auto in AUTO_CLASSES:
        if auto._model_mapping.get(base.config_class, None) is base:
            entries[auto.__name__] = f"{PREFIX}{base.__name__}"
    return {auto: f"{CODE_FILE}.{name}" for auto, name in entries.items()}


class _SavedTypes(dict):
    """transformers' registered config classes, and those of saved SSMax models, made when one is asked for.

    Registering all families at once would import hundreds of modules.
    """

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or _base_type(model_type) is not None

    def __missing__(self, model_type: str) -> type[PreTrainedConfig]:
        base = CONFIG_MAPPING[_base_type(model_type) or model_type]
        self[model_type] = config = config_class(base)
        for auto in AUTO_CLASSES:
            base_model: Any = auto._model_mapping.get(base, None)
            # Mllama's CausalLM class is found by the whole config, and takes the text config alone.
            if getattr(base_model, "config_class", None) is base:
                auto.register(config, model_class(base_model), exist_ok=True)
        return config


def _base_type(model_type: object) -> str | None:
    if not isinstance(model_type, str) or not model_type.startswith("ssmax_"):
        return None
    base = model_type.removeprefix("ssmax_")
    return base if base in CONFIG_MAPPING._mapping else None


def _refuse_plain_configs() -> None:
    """Let a plain class, as in LlamaForCausalLM.from_pretrained, refuse a converted checkpoint; it would run as softmax."""
    original: Any = PreTrainedConfig.__dict__["from_dict"].__func__
    if getattr(original, "_ssmax", False):
        return

    @functools.wraps(original)
    def from_dict(cls, config_dict, **kwargs):
        saved, wanted = str(config_dict.get("model_type", "")), getattr(cls, "model_type", "")
        if (saved.startswith("ssmax_") or "ssmax" in config_dict) and not wanted.startswith("ssmax_"):
            raise ValueError(
                f"the checkpoint is a converted model (model_type {saved!r}); {cls.__name__} would drop its scales and compute plain "
                "softmax. Load it with an Auto class such as AutoModelForCausalLM, then ssmax.revert(model) where softmax is meant"
            )
        return original(cls, config_dict, **kwargs)

    from_dict.__dict__["_ssmax"] = True
    PreTrainedConfig.from_dict = classmethod(from_dict)  # pyrefly: ignore[bad-assignment]


def register() -> None:
    """Make transformers' Auto classes know the converted families, and plain classes refuse them."""
    _refuse_plain_configs()
    if not isinstance(CONFIG_MAPPING._extra_content, _SavedTypes):
        CONFIG_MAPPING._extra_content = _SavedTypes(CONFIG_MAPPING._extra_content)


def __getattr__(name: str) -> Any:
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return model_class(base)
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r} (ssmax {ssmax.__version__})")
