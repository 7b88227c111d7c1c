"""Training a converted model: s and b are not decayed, and may have a learning rate of their own."""

import functools
import sys
from typing import Any

from torch import nn
from transformers import trainer_pt_utils

from ssmax.nn import SSMaxScale

__all__ = ["install", "parameter_groups"]


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, ssmax_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Return the groups of a torch optimizer: matrices, vectors, and the scales s and b.

    Only matrices (rank >= 2) are decayed, as in the paper (Table 2 of arXiv 2501.19399). Parameters that do not learn
    are left out.

    Args:
        model: any module, also one that is wrapped by DDP, FSDP2 or PEFT.
        learning_rate: of all but the scales.
        weight_decay: of matrices.
        ssmax_learning_rate: of s and b; default learning_rate.
    """
    scales = {id(p) for m in model.modules() if isinstance(m, SSMaxScale) for p in m.parameters()}
    learned = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in learned if id(p) not in scales]
    scale_rate = learning_rate if ssmax_learning_rate is None else ssmax_learning_rate
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "lr": learning_rate, "weight_decay": 0.0},
        {"params": [p for p in learned if id(p) in scales], "lr": scale_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def install() -> None:
    """Let transformers' Trainer leave s and b out of weight decay, as it does with norms and biases."""
    original = trainer_pt_utils.get_parameter_names
    if getattr(original, "_ssmax", False):
        return

    @functools.wraps(original)
    def get_parameter_names(*args, **kwargs):
        return [name for name in original(*args, **kwargs) if "ssmax" not in name.split(".")]

    get_parameter_names.__dict__["_ssmax"] = True
    for module in (trainer_pt_utils, sys.modules.get("transformers.trainer")):
        if module is not None:
            module.__dict__["get_parameter_names"] = get_parameter_names
