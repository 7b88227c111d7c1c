"""Refusals: all ways by which transformers would silently load a converted model as another model raise ValueError instead."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ssmax.hf import private

INSTEAD = (
    "Load it with an Auto class such as AutoModelForCausalLM (a class of your own: type(model).from_pretrained, where model is a "
    "converted instance), then call ssmax.revert(model) if softmax is meant"
)


def carries_scales(kind: type) -> bool:
    """Return whether a class is that of a converted model, made by ssmax or by the code file of a checkpoint."""
    return "ssmax" in private.float32_modules(kind)


def is_converted(config: Any) -> bool:
    """Return whether a config, or the content of a config.json, is that of a converted model."""
    fields = config if isinstance(config, dict) else {**vars(config), "model_type": config.model_type}
    names = [str(name) for name in fields.get("architectures") or ()]
    return (
        str(fields.get("model_type", "")).startswith("ssmax_")
        or fields.get("ssmax") is not None
        or any(name.startswith("SSMax") for name in names)
    )


def install() -> None:
    """Make plain classes refuse configs and checkpoints of converted models, and all classes refuse scales that do not fit."""
    wrap(PreTrainedConfig, "from_dict", _refuse_dict)
    wrap(PreTrainedModel, "__init__", _refuse_config)
    wrap(PreTrainedModel, "from_pretrained", _refuse_folder)
    wrap(PreTrainedModel, private.FINISH_LOADING, _refuse_lost_scales)


def wrap(owner: Any, name: str, around: Callable) -> None:
    """Replace a method of a class, or a function of a module, by around(original, ...), once. A class method stays one."""
    method = owner.__dict__[name]
    original = getattr(method, "__func__", method)
    if getattr(original, "_ssmax", False):
        return

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return around(original, *args, **kwargs)

    wrapped.__dict__["_ssmax"] = True
    setattr(owner, name, type(method)(wrapped) if isinstance(method, (classmethod, staticmethod)) else wrapped)


def _refuse_dict(original, cls, config_dict, **kwargs):
    if is_converted(config_dict) and not getattr(cls, "model_type", "").startswith("ssmax_"):
        raise ValueError(
            f"the checkpoint is a converted model (model_type {config_dict.get('model_type')!r}); {cls.__name__} would drop its scales "
            f"and compute plain softmax. {INSTEAD}"
        )
    return original(cls, config_dict, **kwargs)


def _refuse_config(original, self, config, *args, **kwargs):
    foreign = isinstance(config, PreTrainedConfig) and is_converted(config) and not carries_scales(type(self))
    if foreign and not _is_part():
        raise ValueError(
            f"the config is that of a converted model; {type(self).__name__} has no scales and would compute plain softmax. {INSTEAD}"
        )
    return original(self, config, *args, **kwargs)


def _is_part():
    """Return whether a converted model is being built: its parts are plain classes, and may receive its config."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__" and carries_scales(type(frame.f_locals.get("self"))):
            return True
        frame = frame.f_back
    return False


def _refuse_folder(original, cls, source=None, *args, config=None, **kwargs):
    """Check the config.json of the folder itself. A config that is passed in may be another one, or a part of it."""
    part = getattr(cls.config_class, "base_config_key", "")
    if source is not None and not carries_scales(cls) and (config is not None or part):
        where = {
            name: kwargs[name]
            for name in ("cache_dir", "subfolder", "revision", "token", "local_files_only")
            if name in kwargs
        }
        try:
            found, _ = PreTrainedConfig.get_config_dict(source, **where)
        except (OSError, ValueError):  # weights without a config.json: their names are looked at when they are loaded
            found = {}
        _refuse_dict(lambda *_: None, cls, found)
    return original(cls, source, *args, config=config, **kwargs)


def _refuse_lost_scales(original, *args, **kwargs):
    info = original(*args, **kwargs)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in getattr(info, kind) if ".ssmax." in str(name))
        if names:
            raise ValueError(
                f"the checkpoint's SSMax scales do not fit its config.ssmax: {kind.replace('_', ' ')} "
                f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}; it would compute something else"
            )
    return info
