"""Which modules of a model call attention, found by one forward of a copy that shares its parameters."""

import copy
import dis
import functools
import inspect
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ssmax.modules import sdpa
from ssmax.modules.attach import CALLS
from ssmax.private import SOFTMAX_CALLS, base_of, compiler_is_loaded
from ssmax.visible import as_bool

# The functions by which queries and keys become logits; linear counts if its weight is not a parameter.
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "linalg_matmul", "bmm", "mm", "baddbmm", "addbmm", "addmm"}
PRODUCTS |= {"einsum", "tensordot", "inner", "linear"}
SELECT = {"__getitem__", "chunk", "split", "split_with_sizes", "tensor_split", "narrow", "select", "unbind"}
SELECT |= {"index_select", "gather", "take_along_dim"}
# Functions of torch that attend. Code that names one of them attends itself.
ATTEND = {"scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward"}
ATTEND |= {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"}


@dataclass
class Site:
    """A module that calls attention.

    Attributes:
        device: device of its queries.
        heads: number of query heads in each of its calls.
        crossing: for each call, whether keys and queries are made from different inputs.
        dimensions: number of dimensions of its queries, the largest.
    """

    device: torch.device
    heads: list[int] = field(default_factory=list)
    crossing: list[bool] = field(default_factory=list)
    dimensions: int = 0

    @property
    def cross(self) -> bool:
        """Whether all its calls are cross attention."""
        return all(self.crossing)


@dataclass
class Found:
    """The result of a trial forward.

    Attributes:
        sites: modules that call torch's attention, by name.
        by_hand: modules that attend in another way, by name, and whether this is cross attention.
        ran: names of all modules that ran.
    """

    sites: dict[str, Site] = field(default_factory=dict)
    by_hand: dict[str, bool] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)


@functools.cache
def attends_itself(kind: type[nn.Module]) -> bool:
    """Return whether the code of a class calls attention or computes it by hand. Code of torch itself does not count."""
    own = [base for base in kind.__mro__ if not str(base.__module__).startswith("torch.")]
    functions = [x for base in own for x in vars(base).values() if inspect.isfunction(x)]
    names = set().union(*(_names(function) for function in functions))
    called = " ".join(base.__name__.lower() for base in kind.__mro__)
    by_hand = "softmax" in names and ("attention" in called or "attn" in called)
    return by_hand or bool(names & ATTEND)


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
    """Run a trial forward, and return which modules attend. A call belongs to the innermost module whose forward runs.

    The forward runs on a copy in eval mode. The copy shares the parameters; its buffers, caches and
    modes are its own.

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
    recorder = _Recorder()
    for name, module in trial.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.forward = recorder.around(name, module, module.forward)  # pyrefly: ignore[bad-assignment]
    with _quiet(trial), recorder:
        try:
            trial(**inputs) if isinstance(inputs, dict) else trial(*inputs)
        except _Refused as error:
            raise ValueError(str(error)) from None
        except Exception as error:
            raise ValueError(f"the model's forward failed on the example ({type(error).__name__}: {error})") from error
    return recorder.found


class _Refused(Exception):
    """A call of attention that cannot be converted."""


class _Recorder(TorchFunctionMode):
    """Records each call of attention, and from which tensors each tensor was made."""

    def __init__(self):
        super().__init__()
        self.found = Found()
        self.running: list[tuple[str, list[Tensor], bool]] = []  # name, inputs, whether it has parameters
        self.made_from: dict[int, list[Tensor]] = {}
        self.made_by: dict[int, str] = {}
        self.kept: list[Tensor] = []  # kept alive, so that no id is used twice

    def around(self, name, module, forward):
        projects = next(module.parameters(), None) is not None

        def run(*args, **kwargs):
            self.found.ran.add(name)
            self.running.append((name, [x for x in _tensors((args, kwargs)) if x.is_floating_point()], projects))
            try:
                return forward(*args, **kwargs)
            finally:
                self.running.pop()

        return run

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        sources = _tensors((args, kwargs))
        if func in CALLS:
            self._note(func, *args, **kwargs)
        elif name in SOFTMAX_CALLS and sources:
            self._note_by_hand(self._operands(sources[0]))
        elif "attention" in name or "attn" in name:  # a kernel that is not scaled, such as flex_attention
            self._note_by_hand(sources[:2])
        output = func(*args, **kwargs)
        made = sources[:1] if output is None else _tensors(output)  # none: in place, as in x[...] = y
        only_shape = name.startswith("new_") or name.endswith("_like")
        for tensor in made if sources and not only_shape else ():
            self.made_from.setdefault(id(tensor), []).extend(sources)
            self.made_by[id(tensor)] = name
            self.kept.append(tensor)
            base = base_of(tensor)
            if base is not None and any(tensor is x for x in sources):  # written in place, through a view
                self.made_from.setdefault(id(base), []).extend(sources)
                self.kept.append(base)
        return output

    def _note_by_hand(self, operands):
        if len(operands) > 1:
            by_hand, name = self.found.by_hand, self.running[-1][0]
            by_hand[name] = by_hand.get(name, True) and self._crosses(*operands[:2])

    def _operands(self, logits):
        """Return the two tensors whose product the logits are; [] if there is no product, or one of them is a weight."""
        left, seen = [logits], set()
        while left:
            x = left.pop()
            if id(x) in seen:
                continue
            seen.add(id(x))
            sources, maker = self.made_from.get(id(x), []), self.made_by.get(id(x))
            sources = sources[1:] if maker in ("addmm", "addbmm", "baddbmm") else sources  # the first is added
            if maker not in PRODUCTS:
                mixes = maker in SOFTMAX_CALLS or any(isinstance(y, nn.Parameter) and _mixes(y, x) for y in sources)
                left.extend(() if mixes else sources)
            elif not any(self._is_weight(y) for y in sources):
                return sources
        return []

    def _is_weight(self, tensor):
        """Return whether a tensor was made from parameters only."""
        leaves = [x for x in self._ancestors(tensor).values() if id(x) not in self.made_from]
        return bool(leaves) and all(isinstance(x, nn.Parameter) for x in leaves)

    def _note(self, func, query, key, value, *args, **kwargs):
        name = self.running[-1][0]
        site = self.found.sites.setdefault(name, Site(query.device))
        try:
            if func is functional.multi_head_attention_forward:
                site.heads.append(args[1] if len(args) > 1 else kwargs["num_heads"])
                for mask in (kwargs.get("attn_mask"), kwargs.get("key_padding_mask")):
                    if mask is not None:
                        as_bool(mask)
            else:
                site.heads.append(sdpa.num_heads(query))
                site.dimensions = max(site.dimensions, query.ndim)
                _count(query, key, value, *args, **kwargs)
        except ValueError as error:
            raise _Refused(f"the attention of {name or 'the model'} cannot be converted: {error}") from None
        site.crossing.append(self._crosses(query, key))

    def _crosses(self, query, key):
        """Return whether a call is cross attention: the first input that the query was made from did not make the key.

        The inputs are those of the innermost module that has parameters and does not receive split
        heads already.
        """
        of_query, of_key = self._ancestors(query), self._ancestors(key)
        for _, given, projects in reversed(self.running):
            if not projects:
                continue
            stream = next((x for x in given if id(x) in of_query), None)
            if stream is None:
                return query.shape[-2] != key.shape[-2]
            if not (stream.ndim > 3 and stream.shape == query.shape):
                origin = self._origin(stream)
                return not any(id(x) in of_key and (_same(x, stream) or self._origin(x) is origin) for x in given)
        return False

    def _origin(self, tensor):
        """Return what a tensor was made from by projections, norms and reshapes, which keep its tokens."""
        seen = set()
        while id(tensor) not in seen:
            seen.add(id(tensor))
            made_from = self.made_from.get(id(tensor), ())
            sources = {id(x): x for x in made_from if x is not tensor and not self._is_weight(x)}
            if len(sources) == 1 and not self._selects(tensor, *sources.values()):
                (tensor,) = sources.values()
        return tensor

    def _selects(self, part, whole):
        """Return whether a tensor holds some of its source's tokens only, or is an embedding of numbers.

        Parts of the last dimension, and of a stack of q, k, v for each head, hold the same tokens.
        """
        rows = self.made_by.get(id(part)) in SELECT and whole.ndim < 5 and part.shape[-1:] == whole.shape[-1:]
        return rows or not whole.is_floating_point()

    def _ancestors(self, tensor):
        """Return all tensors that a tensor was made from, itself included, by id."""
        found, left = {}, [tensor]
        while left:
            x = left.pop()
            if id(x) not in found:
                found[id(x)] = x
                left.extend(self.made_from.get(id(x), ()))
        return found


def _mixes(weight, output):
    """Return whether a weight mixes entries, as that of a convolution does. One that broadcasts to the output scales or shifts it."""
    fits = weight.ndim <= output.ndim and all(
        n in (1, m) for n, m in zip(weight.shape[::-1], output.shape[::-1], strict=False)
    )
    return weight.ndim > 1 and not fits


def _same(x, y):
    return x is y or (x.shape == y.shape and not x.is_meta and torch.equal(x, y))


def _count(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    return sdpa.count(query, key, attn_mask, is_causal)


def _tensors(tree):
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [x for part in parts for x in _tensors(part)]


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
