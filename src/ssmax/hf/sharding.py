"""FSDP of the scales (s and b): they get a group of their own, since they are float32 and a group has one dtype."""

import functools
import inspect
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

from ssmax.hf.refusals import wrap
from ssmax.private import fsdp_parameter_group
from ssmax.query_scale import QueryScale


def install() -> None:
    """Make FSDP2 (fully_shard) and FSDP1 shard each QueryScale separately from the layer that holds it. Done once.

    Classes are changed instead of functions, so that it also works if fully_shard was imported
    before.
    """
    for kind, apart in ((fsdp_parameter_group(), _apart_in_fsdp2), (FullyShardedDataParallel, _apart_in_fsdp1)):
        wrap(kind, "__init__", functools.partial(_with_changed_arguments, apart))


def _with_changed_arguments(change, original, *args, **kwargs):
    bound = inspect.signature(original).bind(*args, **kwargs)
    change(bound.arguments)
    original(*bound.args, **bound.kwargs)


def _scales(modules):
    """Return (owner, name, scale) of each QueryScale with parameters that lies below these modules."""
    return [
        (owner, name, child)
        for module in modules
        for owner in module.modules()
        for name, child in owner.named_children()
        if isinstance(child, QueryScale) and next(child.parameters(), None) is not None
    ]


def _dtype(scale):
    return next(scale.parameters()).dtype


def _apart_in_fsdp2(arguments: dict[str, Any]) -> None:
    params = {id(p): p for p in arguments["params"]}
    narrow = arguments["mp_policy"].param_dtype
    for _, _, scale in _scales(arguments["modules"]):
        own = [id(p) for p in scale.parameters() if id(p) in params]
        others = {p.dtype for p in arguments["params"] if id(p) not in own}
        if not own or (others <= {_dtype(scale)} and narrow in (None, _dtype(scale))):
            continue
        fully_shard(
            scale,
            mesh=arguments["mesh_info"].mesh,
            # The query keeps its dtype, s is not cast: a scale multiplies in float32 and rounds once.
            mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
            offload_policy=arguments["offload_policy"],
        )
        arguments["params"] = [p for p in arguments["params"] if id(p) not in own]


def _apart_in_fsdp1(arguments: dict[str, Any]) -> None:
    module: nn.Module = arguments["module"]
    if isinstance(module, QueryScale) or arguments.get("auto_wrap_policy") is not None:
        return  # a policy makes an FSDP of each layer, which comes here again
    options = {k: v for k, v in arguments.items() if k not in ("self", "module", "auto_wrap_policy", "mixed_precision")}
    for owner, name, scale in _scales([module]):
        others = {p.dtype for p in module.parameters() if not any(p is own for own in scale.parameters())}
        if others <= {_dtype(scale)} and arguments.get("mixed_precision") is None:
            continue
        setattr(owner, name, FullyShardedDataParallel(scale, **options))
