"""SSMax in Hugging Face models. Importing this makes saved models known to transformers' Auto classes."""

import transformers

from ssmax.versions import require

require("transformers", transformers.__version__)  # first: an older one lacks what is imported below

from ssmax.hf import checkpoint, dispatch, training  # noqa: E402
from ssmax.hf.conversion import convert, converted, revert  # noqa: E402
from ssmax.hf.folding import fold  # noqa: E402
from ssmax.hf.sharp import SharpCache  # noqa: E402
from ssmax.hf.training import parameter_groups  # noqa: E402

__all__ = ["SharpCache", "convert", "converted", "fold", "parameter_groups", "revert"]

dispatch.install()
checkpoint.register()
training.install()
