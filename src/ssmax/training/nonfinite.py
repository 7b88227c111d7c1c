"""Numbers that are not finite: find the first weight, module or gradient that has one."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ssmax.errors import RunFailed


def check_weights(model: nn.Module, step: int) -> None:
    """Raise RunFailed with the weight's name if a weight is not finite."""
    name = _bad_weight(model)
    if name is not None:
        raise RunFailed(f"step {step}: weight {name} is not finite; the checkpoint before it is kept")


def first_not_finite(model: nn.Module, batch: Mapping[str, Any]) -> str:
    """Run a batch again, and return where the first number is not finite: in a weight, an output, the loss or a gradient."""
    weight = _bad_weight(model)
    if weight is not None:
        return f"weight {weight} is not finite"
    outputs: list[str] = []
    gradients: list[str] = []

    def watch(name: str):
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = next((x for x in _flat(output) if isinstance(x, Tensor) and x.is_floating_point()), None)
            if tensor is None:
                return
            if not tensor.isfinite().all():
                outputs.append(name)
            if tensor.requires_grad:
                tensor.register_hook(lambda g: None if g.isfinite().all() else gradients.append(name))

        return look

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                handle = module.register_forward_hook(watch(name))
                hooks.callback(handle.remove)
        loss = model(**batch)["loss"]
        loss.backward()
    if outputs:
        return f"the training loss became {loss.item()}: the output of {outputs[0]} was the first that is not finite"
    if not loss.isfinite():
        return f"the training loss became {loss.item()}, all outputs are finite"
    where = f"that of {gradients[0]} was the first" if gradients else "not in this part of the batch"
    return f"a gradient is not finite though the training loss is {loss.item():.4g}: {where}"


def _bad_weight(model):
    for name, parameter in model.named_parameters():
        own: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # this rank's shard
        if not own.isfinite().all():
            return name
    return None


def _flat(output):
    return output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
