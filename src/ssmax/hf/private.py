"""All private names of transformers and accelerate that ssmax uses. tests/hf/test_private.py tests what ssmax relies on.

Overridden methods are in their classes: _init_weights and _upload_modified_files in checkpoint.py,
and those of the Trainer in training/loop.py. The code that a checkpoint carries
(portable/pieces.py) does not import ssmax and uses its own names.
"""

import types
from typing import Any

from torch import nn
from transformers.modeling_flash_attention_utils import _is_packed_sequence as is_packed_sequence
from transformers.models.auto import modeling_auto, tokenization_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = [
    "AUTO_CLASSES", "FINISH_LOADING", "NAME_KEY", "accelerator_state", "class_attributes", "float32_modules",
    "forward_hooks", "heads_of", "holds_adapter", "implementation_of", "inner_flash", "is_family", "is_initialized", "is_packed_sequence",
    "name_tokenizer", "register_configs", "set_implementation", "tensor_parallel", "unlogged_loss",
]  # fmt: skip

# The Auto classes of models.
AUTO_CLASSES: list[Any] = [
    auto
    for auto in vars(modeling_auto).values()
    if isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass) and auto._model_mapping is not None
]
# The method of PreTrainedModel that ends each loading. It returns the missing, unexpected and mismatched keys.
FINISH_LOADING = "_finalize_model_loading"
# The entry of config.json for the source from which the model was loaded.
NAME_KEY = "_name_or_path"


def heads_of(auto: Any, config_class: type) -> tuple[Any, ...]:
    """Return the model classes that an Auto class may make for a config class; of several it takes the first, or the one that was saved."""
    found = auto._model_mapping.get(config_class, None) or ()
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def is_family(model_type: str) -> bool:
    """Return whether transformers itself has models of this type."""
    return model_type in CONFIG_MAPPING._mapping


def register_configs(kind: type[dict]) -> None:
    """Replace the dict of types that others registered in CONFIG_MAPPING by one of this class, once."""
    if not isinstance(CONFIG_MAPPING._extra_content, kind):
        CONFIG_MAPPING._extra_content = kind(CONFIG_MAPPING._extra_content)


def name_tokenizer(model_type: str, base: str) -> None:
    """Let AutoTokenizer choose the class for a model type as it does for another one."""
    names: Any = tokenization_auto.TOKENIZER_MAPPING_NAMES
    if base in names:
        names.setdefault(model_type, names[base])
    wrong: Any = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    if base in wrong:
        wrong.add(model_type)


def float32_modules(kind: type) -> list[str]:
    """Return the names of the modules that a model class keeps in float32."""
    return list(getattr(kind, "_keep_in_fp32_modules_strict", None) or ())


def class_attributes(float32: list[str] | None = None) -> dict[str, Any]:
    """Return the attributes of a class that is made at run time: no code file, and for a model what it keeps in float32."""
    return {"_auto_class": None} | ({} if float32 is None else {"_keep_in_fp32_modules_strict": float32})


def is_initialized(module: nn.Module) -> bool:
    """Return whether all parameters came from a checkpoint."""
    return all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters())


def holds_adapter(model: nn.Module) -> bool:
    """Return whether transformers loaded a PEFT adapter into the model. It then saves only the adapter."""
    return getattr(model, "_hf_peft_config_loaded", False)


def tensor_parallel(model: nn.Module) -> tuple[int, dict[str, str]]:
    """Return the number of tensor parallel ranks and the plan, which is the model's own dict."""
    return getattr(model, "_tp_size", None) or 1, getattr(model, "_tp_plan", None) or {}


def implementation_of(config: Any) -> str:
    """Return the name of the attention implementation."""
    return config._attn_implementation


def set_implementation(config: Any, name: str) -> None:
    """Choose an attention implementation for a model that has no method for it."""
    config._attn_implementation = name


def inner_flash(attend: Any) -> Any:
    """Return the function that transformers' kernels of FlashAttention call inside; None for other kernels."""
    return attend.__globals__.get("_flash_attention_forward") if isinstance(attend, types.FunctionType) else None


def forward_hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks in a module. Those that offload weights hold the device that computes."""
    hooks = [part._hf_hook for part in module.modules() if hasattr(part, "_hf_hook")]
    return [inner for hook in hooks for inner in getattr(hook, "hooks", (hook,))]


def accelerator_state() -> dict[str, Any]:
    """Return what accelerate holds for the whole process."""
    from accelerate import PartialState

    return PartialState._shared_state


def unlogged_loss(trainer: Any, found: tuple[float, int] | None = None) -> tuple[float, int]:
    """Return the Trainer's sum of losses since its last log entry, and the step of that entry; first add and set `found`."""
    if found is not None:
        trainer._tr_loss += found[0]
        trainer._globalstep_last_logged = found[1]
    return float(trainer._tr_loss), trainer._globalstep_last_logged
