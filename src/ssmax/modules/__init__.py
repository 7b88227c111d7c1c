"""SSMax in any torch.nn.Module: its calls of scaled_dot_product_attention, and nn.MultiheadAttention."""

from ssmax.modules.conversion import convert, revert

__all__ = ["convert", "revert"]
