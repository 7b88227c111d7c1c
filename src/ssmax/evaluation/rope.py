"""RoPE with another theta or scaling, inside a with block."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# "proportional" is left out: it is a kind of partial RoPE with which a model is trained.
ROPE_TYPES = tuple(sorted(set(ROPE_INIT_FUNCTIONS) - {"proportional"}))
FULL = "full_attention"


@contextmanager
def rope_theta(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply RoPE's theta by factor inside the block, as the paper does at test time (50; Figures 5 and 6).

    If layers with a window have a RoPE of their own (Gemma 3), only that of the layers with full
    attention changes.

    Args:
        model: a model of transformers.
        factor: a positive number.

    Raises:
        ValueError: the model has no RoPE of transformers, or factor is not positive and finite.

    Example:
        >>> with ssmax.evaluation.rope_theta(model, 50):
        ...     losses = ssmax.evaluation.loss_by_position(model, token_ids)
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"the factor of RoPE's theta must be positive and finite, got {factor!r}")
    if factor == 1:
        yield
        return
    with _changed(model, lambda rope: {**rope, "rope_theta": rope["rope_theta"] * factor}):
        yield


@contextmanager
def rope_scaling(model: nn.Module, parameters: Mapping[str, Any] | None) -> Iterator[None]:
    """Scale RoPE inside the block by a rule of transformers.

    Args:
        model: a model of transformers.
        parameters: as a config's rope_parameters: rope_type and its values (linear, dynamic, yarn:
            factor; longrope: short_factor and long_factor; llama3: factor, low_freq_factor and
            high_freq_factor). original_max_position_embeddings defaults to the config's
            max_position_embeddings. None changes nothing.

    Raises:
        ValueError: the model has no RoPE of transformers, or the parameters are incomplete.

    Example:
        >>> with ssmax.evaluation.rope_scaling(model, {"rope_type": "yarn", "factor": 4}):
        ...     losses = ssmax.evaluation.loss_by_position(model, token_ids)
    """
    if parameters is None:
        yield
        return
    kind = parameters.get("rope_type")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}")
    kept = ("rope_theta", "partial_rotary_factor")
    with _changed(model, lambda rope: {**{k: rope[k] for k in kept if k in rope}, **parameters}):
        yield


@contextmanager
def _changed(model, change) -> Iterator[None]:
    """Inside the block, replace every rotary module by one with changed rope_parameters."""
    replaced = []
    for name, module in list(model.named_modules()):
        if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)):
            parent, _, child = name.rpartition(".")
            replaced.append((model.get_submodule(parent), child, module, _made_anew(module, change)))
    if not replaced:
        raise ValueError(f"{type(model).__name__} has no RoPE of transformers; leave theta and scaling alone")
    try:
        for parent, child, _, changed in replaced:
            setattr(parent, child, changed)
        yield
    finally:
        for parent, child, before, _ in replaced:
            setattr(parent, child, before)


def _made_anew(rotary, change):
    rope = getattr(getattr(rotary, "config", None), "rope_parameters", None)
    if not rope:
        raise ValueError(f"{type(rotary).__name__} is not a RoPE of transformers; leave theta and scaling alone")
    config = copy.deepcopy(rotary.config)
    by_kind = FULL in rope
    config.rope_parameters = {**rope, FULL: change(rope[FULL])} if by_kind else change(rope)
    made = config.rope_parameters[FULL] if by_kind else config.rope_parameters
    if made.get("rope_type") in ("yarn", "longrope", "llama3"):
        made.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    kind = f"RoPE of type {made.get('rope_type')!r}"
    try:
        changed = type(rotary)(config=config)
        sizes = {len(buffer) for buffer in changed.buffers()}
        for name in {"short_factor", "long_factor"} & made.keys():
            if {len(made[name])} != sizes:
                raise ValueError(f"{kind} needs {max(sizes)} values of {name}, got {len(made[name])}")
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        needs = f"needs {error.args[0]}" if isinstance(error, KeyError) else f"cannot be made of {made}: {error}"
        raise ValueError(f"{kind} {needs}") from error
    if not all((buffer.isfinite() & (buffer >= 0)).all() for buffer in changed.buffers()):  # 0: not rotated (Gemma 4)
        raise ValueError(f"{kind} has frequencies that are negative or not finite with {made}")
    return changed.to(next(rotary.buffers()).device)
