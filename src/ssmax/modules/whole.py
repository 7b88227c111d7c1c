"""Whole or not at all: a change of a model that fails, or is interrupted, leaves the model exactly as it was."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ssmax.query_scale import QueryScale

__all__ = ["scale_parameters", "whole_or_not_at_all"]

Change = TypeVar("Change", bound=Callable[..., Any])


def scale_parameters(model: nn.Module) -> list[Tensor]:
    """Return what the scales of all layers learn, such as s and b."""
    return [
        parameter for module in model.modules() if isinstance(module, QueryScale) for parameter in module.parameters()
    ]


def whole_or_not_at_all(
    written: Callable[[nn.Module], Iterable[Tensor]] = scale_parameters,
) -> Callable[[Change], Change]:
    """Let a function of a model put everything back where it raises, KeyboardInterrupt included.

    Put back are each module's class, attributes, submodules, hooks and mode, the model's config, and which parameters learn.

    Args:
        written: names the tensors whose values the function changes in place; they are copied before.
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
    """An owner's dictionaries, as a module's submodules, parameters and hooks, each with a copy of what it holds."""
    return [(value, dict(value)) for value in vars(owner).values() if isinstance(value, dict)]
