"""Which classes and methods attend, read from their code."""

import dis
import functools
import inspect
import types
from collections.abc import Callable
from contextlib import suppress

from torch import nn

# Functions of torch that attend. Code that names one of them attends itself.
ATTEND = {"scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward"}
ATTEND |= {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"}


@functools.cache
def forward_calls_attention(kind: type[nn.Module], others: tuple[str, ...]) -> bool:
    """Return whether the forward of a class, or a method that it calls, calls a function of torch that attends.

    Code of other libraries, by the starts of their modules' names, does not count, nor a method that may call transformers'
    attention interface instead.
    """
    methods, seen, left = _methods(kind, others), set(), ["forward"]
    while left:
        name = left.pop()
        for function in methods.get(name, ()) if name not in seen else ():
            names = _names(function)
            if names & ATTEND and "get_interface" not in names:
                return True
            left += names & methods.keys()
        seen.add(name)
    return False


@functools.cache
def attends_itself(kind: type[nn.Module], others: tuple[str, ...] = ("torch.",)) -> bool:
    """Return whether the code of a class calls attention, or computes it by hand: a softmax, in a class that is called attention."""
    called = " ".join(base.__name__.lower() for base in kind.__mro__)
    if "attention" in called or "attn" in called:
        functions = [function for own in _methods(kind, others).values() for function in own]
        if any("softmax" in _names(function) for function in functions):
            return True
    return any(_names(function) & ATTEND for own in _methods(kind, others).values() for function in own)


def attending_methods(kind: type[nn.Module]) -> dict[str, Callable]:
    """Return the methods of a class, other than forward, that call attention."""
    found = {name: own for name, own in _methods(kind, ("torch.",)).items() if any(_names(x) & ATTEND for x in own)}
    return {name: own[0] for name, own in found.items() if name != "forward" and not name.startswith("__")}


def _methods(kind, others):
    """Return the functions of a class and its bases by name, the nearest first, without those that other libraries wrote."""
    found: dict[str, list[Callable]] = {}
    for base in kind.__mro__:
        for name, x in vars(base).items() if not str(base.__module__).startswith(others) else ():
            if inspect.isfunction(x):
                found.setdefault(name, []).append(x)
    return found


def _names(function, helpers=True):
    """Return all names in a function's code; one level deep, also those of the functions that its globals and closure hold."""
    function = inspect.unwrap(function)
    codes, found, used = [function.__code__], set(), set()
    while codes:
        code = codes.pop()
        found |= {*code.co_names}
        used |= {x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"}
        codes += [x for x in code.co_consts if inspect.iscode(x)]
    values = [function.__globals__.get(name) for name in used]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    for value in values:
        while type(value) is functools.partial:
            value = value.func
        if type(value) in (types.FunctionType, types.BuiltinFunctionType):  # a proxy may raise at any attribute
            found.add(value.__name__)
        if helpers and type(value) is types.FunctionType and not str(value.__module__).startswith("torch."):
            found |= _names(value, helpers=False)
    return found
