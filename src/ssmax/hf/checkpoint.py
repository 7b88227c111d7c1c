"""Saved models: their own model_type, the recipe in config.ssmax, and a refusal of every checkpoint that lost its scale.

SSMaxLlamaForCausalLM, SSMaxLlamaConfig and the like are made on demand from transformers' class of that name, so that
they can be imported, pickled and named in auto_map.
"""

import functools
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import ssmax
from ssmax.nn import SSMaxScale

__all__ = ["attach", "config_class", "model_class", "register"]

PREFIX = "SSMax"
CODE_FILE = "modeling_ssmax"
# The families whose conversion is verified; all of their layers attend in full.
FAMILIES = {
    "llama": (transformers.LlamaConfig, "LlamaModel", "LlamaForCausalLM"),
    "qwen3": (transformers.Qwen3Config, "Qwen3Model", "Qwen3ForCausalLM"),
}


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
        """Load as transformers does, and raise ValueError where a scale is missing or does not fit."""
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
            names = ", ".join(sorted(name.rsplit(".", 1)[1] for name in self.config.auto_map.values()))
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
        "__module__": __name__,
    }
    return type(f"{PREFIX}{base.__name__}", (SSMaxModel, base), attributes)


def attach(model: PreTrainedModel) -> None:
    """Give the layers named in config.ssmax their scale, at its starting value."""
    recipe = getattr(model.config, "ssmax", None)
    if recipe is None:
        raise ValueError(
            f"config.ssmax is missing: {type(model).__name__} cannot know its scales; convert the model anew"
        )
    for layer, module in attention_modules(model).items():
        if layer in recipe["layers"]:
            module.ssmax = SSMaxScale(module.config.num_attention_heads, recipe["s"], recipe["bias"], recipe["b"]).to(
                module.q_proj.weight.device
            )


def attention_modules(model: nn.Module) -> dict[int, Any]:
    """Return the attention modules of the language model by layer index."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj")]
    return {module.layer_idx: module for module in modules}


def auto_map(base: type[PreTrainedModel]) -> dict[str, str]:
    """Return config.auto_map of a converted model: which class of the code file serves which Auto class."""
    entries = {"AutoConfig": config_class(base.config_class).__name__}
    for auto in (AutoModel, AutoModelForCausalLM):
        if auto._model_mapping.get(base.config_class, None) is base:
            entries[auto.__name__] = f"{PREFIX}{base.__name__}"
    return {auto: f"{CODE_FILE}.{name}" for auto, name in entries.items()}


def register() -> None:
    """Make transformers' Auto classes know the converted families."""
    for base_config, base_model, base_causal in FAMILIES.values():
        config = config_class(base_config)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model_class(getattr(transformers, base_model)), exist_ok=True)
        AutoModelForCausalLM.register(config, model_class(getattr(transformers, base_causal)), exist_ok=True)


def __getattr__(name: str) -> Any:
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return model_class(base)
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r} (ssmax {ssmax.__version__})")
