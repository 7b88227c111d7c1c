"""What a trial forward does: which modules call attention, and from which tensors each tensor was made."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ssmax.modules import sdpa
from ssmax.modules.attach import CALLS
from ssmax.private import SOFTMAX_CALLS, base_of
from ssmax.visible import as_bool

# The functions by which queries and keys become logits; linear counts if its weight is not a parameter.
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "linalg_matmul", "bmm", "mm", "baddbmm", "addbmm", "addmm"}
PRODUCTS |= {"einsum", "tensordot", "inner", "linear"}
MULTIPLY = {"mul", "mul_", "__mul__", "__rmul__", "multiply"}  # and sum, which is a product too
EXPONENTIALS = {"exp", "exp_", "exp2", "exp2_"}  # the first step of a softmax by hand
KERNELS = re.compile(r"attention|attn|flash|sdpa|[mgq]qa|mha")
SELECT = {"__getitem__", "chunk", "split", "split_with_sizes", "tensor_split", "narrow", "select", "unbind"}
SELECT |= {"index_select", "gather", "take_along_dim"}


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
        elsewhere: names of those that ran in another thread, which a trial does not see.
    """

    sites: dict[str, Site] = field(default_factory=dict)
    by_hand: dict[str, bool] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)


class Refused(Exception):
    """A call of attention that cannot be converted."""


class Recorder(TorchFunctionMode):
    """Records each call of attention, and from which tensors each tensor was made."""

    def __init__(self):
        super().__init__()
        self.found, self.thread = Found(), threading.get_ident()
        self.running: list[tuple[str, list[Tensor], bool]] = []  # name, inputs, whether it has parameters
        self.made_from: dict[int, list[Tensor]] = {}
        self.made_by: dict[int, str] = {}
        self.kept: list[Tensor] = []  # kept alive, so that no id is used twice

    def around(self, name: str, module: nn.Module, forward: Callable) -> Callable:
        """Return the forward of a module, which notes itself here while it runs."""
        projects = next(module.parameters(), None) is not None

        def run(*args, **kwargs):
            self.found.ran.add(name)
            if threading.get_ident() != self.thread:
                self.found.elsewhere.add(name)
                return forward(*args, **kwargs)
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
        elif KERNELS.search(name):  # one that is not scaled, such as flex_attention
            self._note_by_hand(sources[:2])
        elif name in PRODUCTS and not any(isinstance(x, nn.Parameter) for x in sources):
            for x in sources:
                self._note_by_hand(self._exponentials(x))
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
            factors = self.made_from.get(id(sources[0]), []) if maker == "sum" else []
            outer = sources and all(x.numel() < sources[0].numel() for x in factors)  # each query with each key
            if len(factors) > 1 and outer and self.made_by[id(sources[0])] in MULTIPLY:
                sources, maker = factors, "matmul"
            if maker not in PRODUCTS:
                mixes = maker in SOFTMAX_CALLS or any(isinstance(y, nn.Parameter) and _mixes(y, x) for y in sources)
                left.extend(() if mixes else sources)
            elif not any(self._is_weight(y) for y in sources):
                return sources
        return []

    def _exponentials(self, weights):
        """Return the two tensors whose product was exponentiated to these weights, [] if there is none."""
        left, seen = [weights], set()
        while left:
            x = left.pop()
            maker, sources = self.made_by.get(id(x)), self.made_from.get(id(x), [])
            if maker in EXPONENTIALS and (found := self._operands(sources[0])):
                return found
            if id(x) not in seen and maker not in PRODUCTS | SOFTMAX_CALLS:
                left.extend(sources)
            seen.add(id(x))
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
                site.heads.append(sdpa.num_heads(query, kwargs.get("enable_gqa", False)))
                site.dimensions = max(site.dimensions, query.ndim)
                _count(query, key, value, *args, **kwargs)
        except ValueError as error:
            raise Refused(f"the attention of {name or 'the model'} cannot be converted: {error}") from None
        site.crossing.append(self._crosses(query, key))

    def _crosses(self, query, key):
        """Return whether a call is cross attention: the key was not made from the first input that the query was made from.

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
