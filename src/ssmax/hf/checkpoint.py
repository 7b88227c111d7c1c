"""Classes of converted models: their own model_type, config.ssmax, and an error for every checkpoint that lost a scale.

SSMaxLlamaForCausalLM, SSMaxLlamaConfig and so on are made on demand from the class of transformers
with that name, so that they can be imported, pickled and named in auto_map.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    processing_auto,
    tokenization_auto,
    video_processing_auto,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from ssmax.hf import private, refusals
from ssmax.hf.portable.card import CARD, keep_card, write_card
from ssmax.hf.portable.code_file import CODE_FILE, PREFIX, write_code
from ssmax.hf.portable.mlx_file import MLX_FILE, write_mlx
from ssmax.hf.scales import (
    attach,
    carriers,
    check_carried,
    check_whole,
    refuse_split_heads,
    shard_by_heads,
)
from ssmax.hf.spec import ScaleSpec
from ssmax.hf.visibility import forward_scope
from ssmax.query_scale import QueryScale
from ssmax.runs.files import SEAL
from ssmax.versions import __version__

logger = logging.get_logger(__name__)

# Mappings from a config to a tokenizer, processor and so on, which a converted model shares with its family.
COMPANIONS: list[Any] = [
    tokenization_auto.TOKENIZER_MAPPING,
    processing_auto.PROCESSOR_MAPPING,
    image_processing_auto.IMAGE_PROCESSOR_MAPPING,
    feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
    video_processing_auto.VIDEO_PROCESSOR_MAPPING,
]


class SSMaxModel(PreTrainedModel):
    """Added to the transformers class of a converted model: scales built from config.ssmax, and strict loading and saving."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        spec = ScaleSpec.of(config, type(self))  # before anything large is made
        config.ssmax = {**config.ssmax, **spec.held()}  # as this version writes it
        super().__init__(config, *args, **kwargs)
        attach(self)
        shard_by_heads(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return what the softmax class returns: transformers does not initialize some buffers of custom code."""
        return softmax_class(cls).is_custom_code()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, QueryScale):
            if not private.is_initialized(module):
                module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, from safetensors alone. Raise ValueError if a scale is missing or does not fit."""
        kwargs.setdefault("use_safetensors", True)  # a pickle would run code
        loaded: Any = super().from_pretrained(*args, **kwargs)
        refuse_split_heads(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load as torch does. Warn if strict is False and the weights of an attention come without its scale."""
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        for name, module in carriers(self):
            own = [f"{name}.{inner}" for inner, _ in module.named_parameters() if not inner.startswith("ssmax.")]
            if any(key.startswith(f"{name}.ssmax.") for key in found.missing_keys) and not {*own} & {
                *found.missing_keys
            }:
                logger.warning(
                    f"the state_dict holds the weights of {name}, but not its SSMax scale; the scale keeps the value it had"
                )
        return found

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Save as transformers does, together with modeling_ssmax.py, mlx_ssmax.py (if mlx-lm can run the model) and the card.

        Raises:
            ValueError: a scale that config.ssmax names is missing in the model, or in the
                state_dict if one is given.
        """
        if is_main_process:
            check_whole(self, state_dict)
        base: Any = softmax_class(type(self))
        own = not _is_transformers(base)  # a class of the user's own has its own code
        if is_main_process and not own and not private.holds_adapter(self):
            classes, folder = heads(base), Path(save_directory)
            self.config.auto_map = auto_map(base)
            write_code(self, base, classes, folder)
            write_mlx(self, folder)
            write_card(self, auto_class(base), folder, values=state_dict is None)
            self.__dict__["_ssmax_card"] = (folder / CARD).read_bytes()
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        if is_main_process:
            (Path(save_directory) / SEAL).unlink(missing_ok=True)  # it describes the files that were replaced

    def _upload_modified_files(self, working_dir: Any, repo_id: str, files_timestamps: dict, *args: Any, **kwargs: Any):
        """Include the code files and the card in a push to a hub. transformers skips files that it did not see change."""
        if "_ssmax_card" not in self.__dict__:
            return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)
        keep_card(Path(working_dir), self.__dict__["_ssmax_card"])
        times = {
            name: time for name, time in files_timestamps.items() if name not in (CARD, f"{CODE_FILE}.py", MLX_FILE)
        }
        return super()._upload_modified_files(working_dir, repo_id, times, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing. Otherwise transformers would copy the source of this package into saved folders."""


def _made_on_demand(base):
    """Return attributes of the class of a converted model or config. Pickle finds only classes of transformers by their names."""
    # _auto_class: code that is registered for the base class would make the base class.
    attributes = {"__module__": __name__, **private.class_attributes()}
    return attributes if _is_transformers(base) else {**attributes, "__reduce_ex__": _reduced}


def _reduced(instance, protocol):
    kept, base = object.__reduce_ex__(instance, protocol), type(instance).__bases__[-1]
    make = model_class if isinstance(instance, PreTrainedModel) else _config_class
    return (_new, (make, base), *kept[2:]) if type(instance) is make(base) else kept


def _new(make, base):
    return make(base).__new__(make(base))


def _is_transformers(base):
    return getattr(transformers, base.__name__, None) is base


@functools.cache
def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the config class of converted models with the config class base, and register it with all Auto classes.

    The model classes also become attributes of the module transformers, where its server looks them
    up by name.
    """
    config = _config_class(base)
    for auto, found in _auto_heads(base).items():
        kinds = tuple(map(model_class, found))
        auto.register(config, kinds if len(kinds) > 1 else kinds[0], exist_ok=True)
        for kind in kinds:
            if _is_transformers(softmax_class(kind)):
                setattr(type(transformers), kind.__name__, kind)
    for mapping in COMPANIONS:
        if base in mapping:
            mapping.register(config, mapping[base], exist_ok=True)
    private.name_tokenizer(f"ssmax_{base.model_type}", base.model_type)
    return config


@functools.cache
def _config_class(base):
    attributes = {
        "model_type": f"ssmax_{base.model_type}",
        "register_for_auto_class": SSMaxModel.register_for_auto_class,
        **_made_on_demand(base),
    }
    return type(f"{PREFIX}{base.__name__}", (base,), attributes)


def _auto_heads(base):
    """Auto class -> transformers' classes for a config class."""
    found = {auto: private.heads_of(auto, base) for auto in private.AUTO_CLASSES}
    # Mllama's CausalLM class is found by the whole config, and takes the text config alone.
    return {auto: kinds for auto, kinds in found.items() if kinds and all(kind.config_class is base for kind in kinds)}


@functools.cache
def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of converted models whose own class is base."""
    attributes = {
        "config_class": _config_class(base.config_class),
        **private.class_attributes([*private.float32_modules(base), "ssmax"]),
        "forward": _scoped(base.forward),
        **_made_on_demand(base),
    }
    kind = type(f"{PREFIX}{base.__name__}", (SSMaxModel, base), attributes)
    # transformers looks up by class name how old weights are called now.
    renamings = get_checkpoint_conversion_mapping(base.__name__)
    if renamings is not None:
        register_checkpoint_conversion_mapping(kind.__name__, renamings, overwrite=True)
    return kind


def softmax_class(kind: type) -> type[PreTrainedModel]:
    """Return the softmax class of a converted model's class, which may also be a subclass of the class that convert made.

    vLLM adds a base of its own to a class when it compiles it.
    """
    bases = (base for one in kind.__mro__ for base in reversed(one.__bases__) if issubclass(base, PreTrainedModel))
    return next(base for base in bases if not refusals.carries_scales(base))


def _scoped(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def scoped(*args, **kwargs):
        check_carried(args[0])
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with forward_scope(kwargs.get("position_ids")):
            return forward(*args, **kwargs)

    return scoped


def heads(base: type[PreTrainedModel]) -> dict[str, type[PreTrainedModel]]:
    """Return the name of each Auto class that knows the family of base, and the class of transformers that it loads: base, if it may."""
    found = _auto_heads(base.config_class)
    return {auto.__name__: base if base in kinds else kinds[0] for auto, kinds in found.items()}


def auto_class(base: type[PreTrainedModel]) -> str | None:
    """Return the name of the Auto class that loads a class, or None."""
    # AutoBackbone takes a folder for a name of timm.
    found = [auto for auto, head in heads(base).items() if head is base and auto != "AutoBackbone"]
    return min(found, key=lambda auto: auto == "AutoModelForPreTraining", default=None)


def auto_map(base: type[PreTrainedModel]) -> dict[str, str]:
    """Return config.auto_map of a converted model: Auto class -> class of the code file. It is empty for the user's own classes."""
    config: Any = base.config_class
    if not _is_transformers(base) or not _is_transformers(config):
        return {}
    names = {"AutoConfig": config.__name__, **{auto: head.__name__ for auto, head in heads(base).items()}}
    return {auto: f"{CODE_FILE}.{PREFIX}{name}" for auto, name in names.items()}


class _SavedTypes(dict):
    """The registered config classes of transformers, and those of saved SSMax models, which are made when they are needed.

    Registering all families at once would import hundreds of modules.
    """

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or _base_type(model_type) is not None

    def __missing__(self, model_type: str) -> type[PreTrainedConfig]:
        base = CONFIG_MAPPING[_base_type(model_type) or model_type]
        self[model_type] = config = config_class(base)
        return config


def _base_type(model_type: object) -> str | None:
    if not isinstance(model_type, str) or not model_type.startswith("ssmax_"):
        return None
    base = model_type.removeprefix("ssmax_")
    return base if private.is_family(base) else None


def register() -> None:
    """Register the converted families with transformers' Auto classes, and make plain classes refuse them."""
    refusals.install()
    private.register_configs(_SavedTypes)


def __getattr__(name: str) -> Any:
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        config_class(base.config_class)
        return model_class(base)
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r} (ssmax {__version__})")
