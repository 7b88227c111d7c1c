"""SSMax in Hugging Face models. Importing this makes saved models known to transformers' Auto classes."""

from importlib import import_module
from typing import Any

import torch

from ssmax.versions import TORCH_OF_TRANSFORMERS, require

require("torch", torch.__version__, TORCH_OF_TRANSFORMERS)  # first: an older one lacks what is imported below

import transformers  # noqa: E402

require("transformers", transformers.__version__)

from ssmax.hf import adapters, checkpoint, conversion, dispatch, sharding, training  # noqa: E402
from ssmax.hf.folding import fold  # noqa: E402
from ssmax.hf.sharp_cache import SharpCache  # noqa: E402
from ssmax.hf.training import parameter_groups  # noqa: E402

__all__ = ["SharpCache", "conversion", "fold", "parameter_groups"]

adapters.install()
dispatch.install()
checkpoint.register()
training.install()
sharding.install()


def __getattr__(name: str) -> Any:
    if name in ("convert", "converted", "revert"):  # where earlier versions had them too
        return getattr(import_module("ssmax.conversion"), name)
    raise AttributeError(f"module 'ssmax.hf' has no attribute {name!r}")
