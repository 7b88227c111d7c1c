"""Checks of arguments. Errors name the argument."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmax.versions import require

__all__ = ["check_flag", "check_plain", "moved", "whole_number"]

require("torch", torch.__version__)


def whole_number(value: Any, name: str, lowest: int) -> int:
    """Return an integer, numpy's too, as Python's own, or raise ValueError where it is none or below the lowest."""
    if not isinstance(value, bool) and isinstance(value, (int, np.integer)) and lowest <= value < 2**63:
        return value if isinstance(value, int) else int(value)
    raise ValueError(f"{name} must be a {('non-negative', 'positive')[lowest]} integer, got {value!r}")


def check_flag(value: Any, name: str) -> None:
    """Raise TypeError where a value is no truth value."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_plain(tensor: Tensor, name: str, device: torch.device | None = None) -> None:
    """Raise TypeError for sparse, complex and 8-bit floating tensors, ValueError where one is not on the given device."""
    narrow = tensor.is_floating_point() and tensor.dtype.itemsize < 2
    if tensor.layout != torch.strided or tensor.is_complex() or narrow:
        raise TypeError(
            f"{name} must be a dense tensor of real numbers of 16 bits or more, got {tensor.dtype} {tensor.layout}"
        )
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def moved(tensor: Tensor, name: str, device: torch.device) -> Tensor:
    """Return a tensor on the device, or raise as check_plain does; one on the meta device has nothing to move."""
    check_plain(tensor, name, device if tensor.device.type == "meta" else None)
    return tensor.to(device)
