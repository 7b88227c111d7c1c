"""Checks of arguments. Errors name the argument."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmax.private import is_batched
from ssmax.versions import require

require("torch", torch.__version__)


def whole_number(value: Any, name: str, lowest: int) -> int:
    """Return an integer (also numpy's) as Python's int. Raise ValueError if it is not an integer or below the lowest."""
    if not isinstance(value, bool) and isinstance(value, (int, np.integer)) and lowest <= value < 2**63:
        return value if isinstance(value, int) else int(value)
    raise ValueError(f"{name} must be a {('non-negative', 'positive')[lowest]} integer, got {value!r}")


def check_flag(value: Any, name: str) -> None:
    """Raise TypeError if a value is not True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_plain(tensor: Tensor, name: str, device: torch.device | None = None) -> None:
    """Raise TypeError for sparse, complex and 8-bit floating tensors, and ValueError for one on another device."""
    narrow = tensor.is_floating_point() and tensor.dtype.itemsize < 2
    if tensor.layout != torch.strided or tensor.is_complex() or narrow:
        raise TypeError(
            f"{name} must be a dense tensor of real numbers of 16 bits or more, got {tensor.dtype} {tensor.layout}"
        )
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def moved(tensor: Tensor, name: str, device: torch.device) -> Tensor:
    """Return a tensor moved to the device; raise as check_plain does. A meta tensor cannot be moved: it must be there."""
    check_plain(tensor, name, device if tensor.device.type == "meta" else None)
    return tensor.to(device)


def is_readable(tensor: Tensor) -> bool:
    """Return whether values can be read without a device synchronisation, a graph break or an error of vmap."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_batched(tensor)


def as_count(n: Tensor | int, device: torch.device) -> Tensor:
    """Return n as a tensor on the device. Raise ValueError if it is negative or not finite."""
    if not isinstance(n, Tensor):
        # torch.full takes a symbolic size as it is; as_tensor would compile again for each number.
        return torch.full((), _as_number(n), device=device)
    n = moved(n, "n", device)
    if is_readable(n) and not ((n >= 0) & (n < math.inf)).all():
        raise ValueError(
            f"n counts visible keys and must be finite and not negative, got {n.min().item()} to {n.max().item()}"
        )
    return n


def _as_number(n: Any) -> Any:
    """Return an n that is the same for all rows. Raise ValueError if it is negative or not finite."""
    if isinstance(n, torch.SymInt):  # a size that torch.export leaves open
        return n
    if isinstance(n, bool) or not isinstance(n, (int, float, np.integer, np.floating)):
        raise TypeError(f"n must be a tensor or a number, got {type(n).__name__}")
    if not torch.compiler.is_compiling() and not 0 <= n < 2**63:
        raise ValueError(f"n counts visible keys and must be finite and not negative, got {n}")
    return n
