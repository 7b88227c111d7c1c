"""convert and revert for any torch.nn.Module: which of its modules get a scale, and with which starting values."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssmax.modules import attach, multihead
from ssmax.modules.code import attends_itself
from ssmax.modules.discovery import discover, multihead_sites
from ssmax.modules.recorder import Found
from ssmax.nn import SSMaxScale, starting_values


@dataclass(frozen=True)
class Options:
    """The arguments of ssmax.convert, which documents them."""

    init: str | float
    train_length: int | None
    bias: bool | None
    layers: list[int | str] | None
    law: str
    law_parameters: dict[str, float]
    example: Any
    cross: bool


# What modules call the number of their heads.
HEADS = ("num_heads", "n_heads", "n_head", "heads", "num_attention_heads")


def convert(model: nn.Module, options: Options) -> None:
    """Convert the attention of any module to SSMax, in place; see ssmax.convert."""
    if options.law != "ssmax" or options.law_parameters:
        raise ValueError("law and law_parameters are for transformers models; other modules take s log n + b")
    layers, example, cross = options.layers, options.example, options.cross
    if any(isinstance(module, attach.Changed) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is converted already; ssmax.revert(model) gives back the softmax model"
        )
    modules = dict(model.named_modules())
    if example is None:
        found = multihead_sites(model)
        chosen = _chosen(model, found, layers, cross, example)
        _check_seen(modules, chosen, layers)
    else:
        trial = discover(model, example)
        found = trial.sites
        chosen = _chosen(model, found, layers, cross, example)
        _check_all_ran(modules, trial, layers)
        _check_by_hand(modules, trial, chosen, layers, cross)
        _check_all_seen(modules, trial, layers)
    values = starting_values(options.init, options.bias, options.train_length)
    scales = {name: _scale(name, modules[name], found[name], values) for name in chosen}
    for name, scale in scales.items():
        attach.change(modules[name], _kind(modules[name]))
        modules[name].ssmax = scale
    for module, kind in [*_neighbours(modules, found, scales)]:
        attach.change(module, kind)
    _warn(modules, found, chosen)


def _warn(modules, found, chosen):
    """Warn of values of s that are shared."""
    repeated = [name or type(modules[name]).__name__ for name in chosen if len(found[name].heads) > 1]
    if repeated:
        warnings.warn(
            f"called more than once in a forward, with one scale for all calls: {', '.join(repeated)}", stacklevel=5
        )
    for name in chosen:
        said = _heads_said(modules[name])
        if said and found[name].heads[0] not in said:
            warnings.warn(
                f"{_shown(modules, name)} says that it has {said[0]} heads, and its query has {found[name].heads[0]}; the heads seem to be "
                f"folded into the batch. It gets {found[name].heads[0]} values of s",
                stacklevel=5,
            )


def revert(model: nn.Module) -> None:
    """Remove SSMax from a module, in place; see ssmax.revert."""
    changed = [module for module in model.modules() if isinstance(module, attach.Changed)]
    if not changed:
        raise ValueError(f"{type(model).__name__} is not a converted model")
    for module in changed:
        attach.restore(module)


def _check_seen(modules, chosen, layers):
    """Raise ValueError if the model may call attention that only a forward of an example would show."""
    own = [name for name in chosen if _kind(modules[name]) is not attach.Multihead]
    if own:
        raise ValueError(
            f"{own[0] or 'the model'} is a subclass of nn.MultiheadAttention with its own forward, whose calls are found only by "
            "running it: pass example=(inputs,)"
        )
    more = [
        _shown(modules, name)
        for name, module in modules.items()
        if layers is None and not isinstance(module, nn.MultiheadAttention) and attends_itself(type(module))
    ]
    if more:
        raise ValueError(
            f"{more[0]} calls attention too, which is found only by running it: pass example=(inputs,), or layers=[...] without it"
        )


def _check_all_ran(modules, trial: Found, layers):
    """Raise ValueError if a module that may attend, by its class or its code, did not run in the example."""
    kinds = {type(modules[name]) for name in trial.sites}
    idle = [
        name
        for name, module in modules.items()
        if name not in trial.sites and (layers is None or name in layers)
        if isinstance(module, nn.MultiheadAttention)
        or (
            name not in trial.ran
            and (type(module) in kinds or (attends_itself(type(module)) and not _inside(name, trial.sites)))
        )
    ]
    if idle:
        raise ValueError(
            f"{_shown(modules, idle[0])} did not run in the example. It is unused, or other code reads its weights and would "
            "stay softmax. Pass an example that runs it, or leave it out of layers=[...]"
        )


def _check_all_seen(modules, trial: Found, layers):
    """Raise ValueError if attention ran in the example where a trial cannot see it: in TorchScript, or in another thread."""
    unseen = [
        name
        for name, module in modules.items()
        if layers is None and name not in trial.sites
        if (isinstance(module, torch.jit.ScriptModule) and "scaled_dot_product_attention" in str(module.inlined_graph))
        or (name in trial.elsewhere and attends_itself(type(module)))
    ]
    if unseen:
        raise ValueError(
            f"{_shown(modules, unseen[0])} may attend and ran in TorchScript or in another thread, where a trial cannot see it; it may stay "
            "softmax. Run it in eager mode in the main thread, or leave it out of layers=[...]"
        )


def _inside(name, sites):
    """Return whether a module lies inside one that attends, which may call another method of it than forward."""
    return any(name.startswith(f"{site}." if site else "") for site in sites)


def _check_by_hand(modules, trial: Found, chosen, layers, cross):
    """Raise ValueError if attention that cannot be converted would stay softmax beside converted attention."""
    left = [
        name for name, crosses in trial.by_hand.items() if name in chosen or (layers is None and (cross or not crosses))
    ]
    if left:
        raise ValueError(
            f"{_shown(modules, left[0])} attends without torch.nn.functional.scaled_dot_product_attention (by hand, or by another "
            "kernel) and would stay softmax; let it use torch's function (timm: fused_attn, x-transformers: flash=True)"
            + ("" if left[0] in chosen else ", or list the modules to convert in layers=[...]")
        )


def _shown(modules, name):
    return f"{name or 'the model'} ({type(modules[name]).__name__})"


def _chosen(model, found, layers, cross, example):
    """Return the names of the modules to convert, or raise ValueError."""
    name = type(model).__name__
    if not found and example is None:
        raise ValueError(
            f"{name} holds no nn.MultiheadAttention; pass example=(inputs,), the positional inputs of one forward. That forward shows "
            "which modules call torch.nn.functional.scaled_dot_product_attention"
        )
    if not found:
        raise ValueError(
            f"{name} has nothing to convert: no call of torch.nn.functional.scaled_dot_product_attention was made in the example's "
            "forward. Attention that is written by hand cannot be converted; let the model use torch's function (timm: fused_attn, "
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
    """Return the scale of a module, or raise ValueError if it cannot have one."""
    shown = _shown({name: module}, name)
    if len(set(site.heads)) > 1:
        raise ValueError(f"{shown} calls attention with {sorted(set(site.heads))} heads; one scale cannot serve both")
    said = _heads_said(module)
    if site.dimensions > 4 and said and site.heads[0] not in said:
        raise ValueError(
            f"{shown} says that it has {said[0]} heads, and calls attention with a query of {site.dimensions} dimensions, whose third last "
            f"is {site.heads[0]}; SSMax takes the heads there, as torch does. Leave it out by layers=[...]"
        )
    if "forward" in vars(module):
        raise ValueError(f"{shown} has a forward set on the instance, which would bypass the scale; remove it first")
    if hasattr(module, "ssmax"):
        raise ValueError(f"{shown} has an attribute ssmax already")
    if isinstance(module, nn.MultiheadAttention):
        multihead.check(module.bias_k, module.add_zero_attn)
    return SSMaxScale(site.heads[0], **values).to(site.device)


def _heads_said(module):
    return [getattr(module, name) for name in HEADS if isinstance(getattr(module, name, None), int)]


def _kind(module):
    if not isinstance(module, nn.MultiheadAttention):
        return attach.Scoped
    return attach.Multihead if type(module).forward is nn.MultiheadAttention.forward else attach.ScopedMultihead


def _neighbours(modules, found, scales):
    """Yield the modules whose class must change because other modules get scales, each with its kind.

    These are modules that run inside a converted forward without being converted, and encoders that
    would make nested tensors.
    """
    for name, module in modules.items():
        inside = any(name != other and name.startswith(f"{other}." if other else "") for other in scales)
        if name in found and name not in scales and inside:
            yield module, attach.Unscaled
        if isinstance(module, nn.TransformerEncoder) and any(
            other.startswith(f"{name}." if name else "") for other in scales
        ):
            yield module, attach.PaddedEncoder
