"""SSMax in Hugging Face models. Importing this makes saved models known to transformers' Auto classes."""

from ssmax.hf import checkpoint, dispatch, training
from ssmax.hf.conversion import convert, converted, revert
from ssmax.hf.folding import fold
from ssmax.hf.sharp import SharpCache
from ssmax.hf.training import parameter_groups

__all__ = ["SharpCache", "convert", "converted", "fold", "parameter_groups", "revert"]

dispatch.install()
checkpoint.register()
training.install()
