"""Training a converted model with transformers' Trainer: s and b are not decayed."""

import sys
from typing import Any

import torch
from transformers import trainer_pt_utils

from ssmax import nn
from ssmax.hf.refusals import wrap


def parameter_groups(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, ssmax_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Return ssmax.parameter_groups of the model; these are the argument names of earlier versions."""
    return nn.parameter_groups(model, learning_rate, weight_decay, ssmax_learning_rate)


def install() -> None:
    """Make transformers' Trainer exclude s and b from weight decay, like norms and biases."""
    for module in (trainer_pt_utils, sys.modules.get("transformers.trainer")):
        if module is not None:
            wrap(module, "get_parameter_names", _decayed)


def _decayed(original, *args, **kwargs):
    return [name for name in original(*args, **kwargs) if "ssmax" not in name.split(".")]
