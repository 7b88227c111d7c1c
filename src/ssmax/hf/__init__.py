"""SSMax in Hugging Face models. Importing this makes saved models known to transformers' Auto classes."""

from ssmax.hf import checkpoint, dispatch
from ssmax.hf.conversion import convert, converted, revert
from ssmax.hf.folding import fold

__all__ = ["convert", "converted", "fold", "revert"]

dispatch.install()
checkpoint.register()
