"""RoPE with another theta, for the length of a measurement."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["rope_theta"]


@contextmanager
def rope_theta(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply RoPE's theta by factor inside the block, as the paper does at test time (50; Fig. 5 and 6).

    Raises:
        ValueError: the model has no RoPE of transformers' default kind, or factor is not positive.
    """
    if not factor > 0:
        raise ValueError(f"the factor of RoPE's theta must be positive, got {factor!r}")
    if factor == 1:
        yield
        return
    rotaries: list[Any] = [
        module for module in model.modules() if hasattr(module, "inv_freq") and hasattr(module, "config")
    ]
    if not rotaries or any(rotary.config.rope_parameters.get("rope_type") != "default" for rotary in rotaries):
        raise ValueError(f"{type(model).__name__} has no RoPE of type 'default'; its theta cannot be raised")
    before = [rotary.inv_freq for rotary in rotaries]
    try:
        for rotary in rotaries:
            config = copy.deepcopy(rotary.config)
            config.rope_parameters = {
                **config.rope_parameters,
                "rope_theta": config.rope_parameters["rope_theta"] * factor,
            }
            rotary.inv_freq = type(rotary)(config=config).inv_freq.to(rotary.inv_freq)
        yield
    finally:
        for rotary, inv_freq in zip(rotaries, before, strict=True):
            rotary.inv_freq = inv_freq
