"""SSMax in Hugging Face models. Importing this makes saved models known to transformers' Auto classes."""

import torch

from ssmax.versions import TORCH_OF_TRANSFORMERS, require

require("torch", torch.__version__, TORCH_OF_TRANSFORMERS)  # first: an older one lacks what is imported below

import transformers  # noqa: E402

require("transformers", transformers.__version__)

from ssmax.hf import (  # noqa: E402
    checkpoint,
    dispatch,
    sharding,
    training,
)
from ssmax.hf.conversion import convert, converted, revert  # noqa: E402
from ssmax.hf.folding import fold  # noqa: E402
from ssmax.hf.sharp_cache import SharpCache  # noqa: E402
from ssmax.hf.training import parameter_groups  # noqa: E402

__all__ = ["SharpCache", "convert", "converted", "fold", "parameter_groups", "revert"]

dispatch.install()
checkpoint.register()
training.install()
sharding.install()
