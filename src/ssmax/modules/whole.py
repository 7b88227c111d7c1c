"""Changes of a model that either succeed or leave the model exactly as it was, also when interrupted."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ssmax.query_scale import QueryScale

Change = TypeVar("Change", bound=Callable[..., Any])


def scale_parameters(model: nn.Module) -> list[Tensor]:
    """Return the parameters of all scales of a model, such as s and b."""
    return [
        parameter for module in model.modules() if isinstance(module, QueryScale) for parameter in module.parameters()
    ]


def whole_or_not_at_all(
    written: Callable[[nn.Module], Iterable[Tensor]] = scale_parameters,
) -> Callable[[Change], Change]:
    """Decorate a function that changes a model: if it raises (KeyboardInterrupt included), everything is restored.

    Restored are each module's class, attributes, submodules, hooks and mode, the model's config,
    and requires_grad.

    Args:
        written: returns the tensors whose values the function changes in place; these are copied
            before.
    """

    def decorate(change: Any) -> Any:
        @functools.wraps(change)
        def guarded(model: Any, *args: Any, **kwargs: Any) -> Any:
            restore = _snapshot(model, written) if isinstance(model, nn.Module) else _nothing
            try:
                return change(model, *args, **kwargs)
            except BaseException:
                restore()
                raise

        return guarded

    return decorate


def _nothing():
    pass


def _snapshot(model, written):
    owners = [*model.modules(), *([model.config] if hasattr(vars(model).get("config"), "__dict__") else [])]
    states = [(owner, type(owner), dict(vars(owner)), _tables(owner)) for owner in owners]
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in written(model)]

    @torch.no_grad()
    def restore():
        for owner, kind, attributes, tables in states:
            owner.__class__ = kind
            for name in vars(owner).keys() - attributes.keys():
                del vars(owner)[name]
            vars(owner).update(attributes)
            for table, content in tables:
                table.clear()
                table.update(content)
        for tensor, value in values:
            tensor.copy_(value)
        for parameter, learned in learns:
            if parameter.requires_grad != learned:
                parameter.requires_grad_(learned)

    return restore


def _tables(owner):
    """Return the dictionaries of an owner (a module's submodules, parameters, hooks), each with a copy of its content."""
    return [(value, dict(value)) for value in vars(owner).values() if isinstance(value, dict)]
