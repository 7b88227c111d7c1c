"""Which modules of a model call attention, found by one forward of a copy that shares its parameters."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ssmax.modules.code import attending_methods
from ssmax.modules.recorder import Found, Recorder, Refused, Site
from ssmax.private import compiler_is_loaded


def multihead_sites(model: nn.Module) -> dict[str, Site]:
    """Return the nn.MultiheadAttention modules by name, without running them.

    A module counts as cross attention if its keys cannot be its own tokens (kdim or vdim differ),
    or if it is the multihead_attn of an nn.TransformerDecoderLayer. All others count as
    self-attention.
    """
    crossing = {id(m.multihead_attn) for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer)}
    return {
        name: Site(
            m.out_proj.weight.device,
            [m.num_heads],
            [id(m) in crossing or not m.kdim == m.vdim == m.embed_dim],
        )
        for name, m in model.named_modules()
        if isinstance(m, nn.MultiheadAttention)
    }


def discover(model: nn.Module, example: Any) -> Found:
    """Run a trial forward, and return which modules attend. A call belongs to the innermost module that runs.

    A module runs in its forward, and in its other methods that call attention. The trial runs on a
    copy in eval mode. The copy shares the parameters; its buffers, caches and modes are its own.

    Args:
        model: any module.
        example: positional inputs of its forward, a tuple; or a dict of keyword inputs.

    Raises:
        ValueError: the forward fails, or a mask is a bias.
    """
    if not isinstance(example, (tuple, list, dict)):
        raise ValueError(f"example must be a tuple of the forward's inputs, as in (x,), got {type(example).__name__}")
    trial = _copied(model).eval()
    inputs = _cloned(example)
    recorder = Recorder()
    for name, module in trial.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for method in ("forward", *attending_methods(type(module))):
                setattr(module, method, recorder.around(name, module, getattr(module, method)))
    with _quiet(trial), recorder:
        try:
            trial(**inputs) if isinstance(inputs, dict) else trial(*inputs)
        except Refused as error:
            raise ValueError(str(error)) from None
        except Exception as error:
            raise ValueError(f"the model's forward failed on the example ({type(error).__name__}: {error})") from error
    return recorder.found


def _cloned(tree):
    """Return a copy of the example, since a forward may change its tensors in place."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if type(tree) in (tuple, list):
        return type(tree)(map(_cloned, tree))
    if type(tree) is dict:
        return {name: _cloned(x) for name, x in tree.items()}
    return copy.deepcopy(tree)


def _copied(model):
    """Return a copy of the model that shares its parameters, and the tensors that cannot be copied (results of a forward)."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        shared |= {id(x): x for x in vars(module).values() if isinstance(x, Tensor) and not x.is_leaf}
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise ValueError(f"the model cannot be copied for a trial forward ({type(error).__name__}: {error})") from error


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Run the block without gradients, warnings and compiled code; afterwards restore the random states."""
    devices = {x.device for x in (*model.parameters(), *model.buffers()) if x.device.type == "cuda"}
    eager = torch.compiler.set_stance("force_eager") if compiler_is_loaded() else nullcontext()
    with torch.no_grad(), torch.random.fork_rng(devices), eager, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
