"""convert and revert of any torch.nn.Module: which of its modules get a scale, and which values it starts from."""

import warnings
from typing import Any

from torch import nn

from ssmax.modules import attach, multihead
from ssmax.modules.discovery import discover, multihead_sites
from ssmax.nn import SSMaxScale, starting_values

__all__ = ["convert", "revert"]


def convert(
    model: nn.Module,
    init: str | float = "matched",
    *,
    train_length: int | None = None,
    bias: bool | None = None,
    layers: list[str] | None = None,
    example: Any = None,
    cross: bool = False,
) -> nn.Module:
    """Turn the attention of any module into SSMax, in place; arguments as ssmax.convert."""
    if any(isinstance(module, attach.Changed) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is converted already; ssmax.revert(model) gives back the softmax model"
        )
    modules = dict(model.named_modules())
    if example is None:
        found = multihead_sites(model)
        chosen = _chosen(model, found, layers, cross, example)
        _check_own_forwards(modules, chosen)
    else:
        found = discover(model, example)
        chosen = _chosen(model, found, layers, cross, example)
        _check_all_ran(model, found, layers)
    values = starting_values(init, bias, train_length)
    scales = {name: _scale(name, modules[name], found[name], values) for name in chosen}
    for name, scale in scales.items():
        attach.change(modules[name], _kind(modules[name]))
        modules[name].ssmax = scale
    for module, kind in [*_neighbours(modules, found, scales)]:
        attach.change(module, kind)
    repeated = [name or type(model).__name__ for name in chosen if len(found[name].heads) > 1]
    if repeated:
        warnings.warn(
            f"called more than once in a forward, with one scale for all calls: {', '.join(repeated)}", stacklevel=4
        )
    return model


def revert(model: nn.Module) -> nn.Module:
    """Take SSMax out of a module again, in place; see ssmax.revert."""
    changed = [module for module in model.modules() if isinstance(module, attach.Changed)]
    if not changed:
        raise ValueError(f"{type(model).__name__} is not a converted model")
    for module in changed:
        attach.restore(module)
    return model


def _check_own_forwards(modules, chosen):
    own = [name for name in chosen if _kind(modules[name]) is not attach.Multihead]
    if own:
        raise ValueError(
            f"{own[0] or 'the model'} is a subclass of nn.MultiheadAttention with a forward of its own; what it calls is seen in a "
            "forward only: pass example=(inputs,)"
        )


def _check_all_ran(model, found, layers):
    idle = [name for name in multihead_sites(model) if name not in found and (layers is None or name in layers)]
    if idle:
        raise ValueError(
            f"nn.MultiheadAttention {idle[0]!r} did not run in the example: it is unused, or its weights are read by other code, "
            "which would stay softmax; pass an example that runs it, or layers=[...] without it"
        )


def _chosen(model, found, layers, cross, example):
    """The names to convert, or ValueError."""
    name = type(model).__name__
    if not found and example is None:
        raise ValueError(
            f"{name} holds no nn.MultiheadAttention; pass example=(inputs,), the positional inputs of one forward, by which the calls "
            "of torch.nn.functional.scaled_dot_product_attention are found"
        )
    if not found:
        raise ValueError(
            f"{name} has nothing to convert: no call of torch.nn.functional.scaled_dot_product_attention came in the example's "
            "forward. Attention that is written by hand is not seen; let the model use torch's function (timm: fused_attn, "
            "x-transformers: flash=True)"
        )
    if layers is not None:
        unknown = [layer for layer in layers if layer not in found]
        if unknown or not layers:
            raise ValueError(f"layers must be some of {', '.join(map(repr, found))}, got {layers}")
        return [layer for layer in found if layer in layers]
    chosen = [layer for layer, site in found.items() if cross or not site.cross]
    if not chosen:
        raise ValueError(
            f"all attention of {name} is cross attention ({', '.join(found)}); pass cross=True to convert it"
        )
    return chosen


def _scale(name, module, site, values):
    """The scale of a module, or ValueError where it cannot have one."""
    shown = f"{name or 'the model'} ({type(module).__name__})"
    if len(set(site.heads)) > 1:
        raise ValueError(f"{shown} calls attention with {sorted(set(site.heads))} heads; one scale cannot serve both")
    if "forward" in vars(module):
        raise ValueError(
            f"{shown} has a forward set on the instance, past which a scale would not come; remove it first"
        )
    if hasattr(module, "ssmax"):
        raise ValueError(f"{shown} has an attribute ssmax already")
    if isinstance(module, nn.MultiheadAttention):
        multihead.check(module.bias_k, module.add_zero_attn)
    return SSMaxScale(site.heads[0], **values).to(site.device)


def _kind(module):
    if not isinstance(module, nn.MultiheadAttention):
        return attach.Scoped
    return attach.Multihead if type(module).forward is nn.MultiheadAttention.forward else attach.ScopedMultihead


def _neighbours(modules, found, scales):
    """The modules that change because of those with scales.

    What is not converted but runs inside of a converted forward, and encoders, which else would make nested tensors.
    """
    for name, module in modules.items():
        inside = any(name != other and name.startswith(f"{other}." if other else "") for other in scales)
        if name in found and name not in scales and inside:
            yield module, attach.Unscaled
        if isinstance(module, nn.TransformerEncoder) and any(
            other.startswith(f"{name}." if name else "") for other in scales
        ):
            yield module, attach.PaddedEncoder
