"""SSMax in Hugging Face models. Importing this makes saved models known to transformers' Auto classes."""

from ssmax.hf import checkpoint, dispatch
from ssmax.hf.conversion import convert, converted, revert

__all__ = ["convert", "converted", "revert"]

dispatch.install()
checkpoint.register()
