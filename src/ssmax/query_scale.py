"""Modules that multiply the queries of one attention layer: the base class, and the query-aware one."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from ssmax.scaling import log_visible, matched_scale
from ssmax.visible import rows_of

WIDEST = 65_536  # hidden size of the query-aware law


class QueryScale(nn.Module):
    """A module that multiplies the queries of one attention layer. Its parameters are float32.

    They stay float32 through .to(bfloat16), .half() and autocast, since in bfloat16 small steps of
    s would be lost and products would be inexact. Only .double() widens them.
    ssmax.parameter_groups excludes them from weight decay.

    Attributes:
        law: its name in ssmax.laws.LAWS.
    """

    law: str

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The learned parameters that hold one number for each head, (H,) each, by their names in the formula."""
        return dict(self.named_parameters(recurse=False))

    def reset_parameters(self) -> None:
        """Set the learned parameters to their starting values."""

    def check_query(self, query: Tensor, heads: int) -> None:
        """Raise ValueError or TypeError unless a query is (B, heads, N, D), floating point."""
        if query.ndim != 4 or query.shape[1] != heads:
            raise ValueError(
                f"query must be (B, {heads} heads, N, D), got shape {tuple(query.shape)}; under tensor parallelism load a "
                "converted checkpoint with tp_plan='auto', which shards s and b as well"
            )
        if not query.is_floating_point():
            raise TypeError(f"query must be floating point, got {query.dtype}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QueryScale":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not moved.is_floating_point() or moved.dtype in (torch.float32, torch.float64):
                return moved
            return tensor.to(moved.device, torch.float32)

        without_values = any(parameter.is_meta for parameter in self.parameters())
        applied = super()._apply(keep_precision, recurse)
        if without_values and not any(parameter.is_meta for parameter in self.parameters()):
            self.reset_parameters()  # after to_empty, values that are not loaded are the starting values
        return applied

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:  # pyrefly: ignore[bad-override]
        for name, own in self.named_parameters():  # assign=True would take another dtype as it comes
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.is_floating_point():
                state_dict[prefix + name] = saved.to(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


def own_part(parameter: Any) -> Any:
    """Return this rank's part of a parameter that tensor parallelism shards by heads."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


class QueryAwareScale(QueryScale):
    """TabICLv2's law: multiply each component of the query by MLP(log n) (1 + tanh(MLP(q))).

    Both networks have one hidden layer with GELU; their parameters are float32. At the start they
    compute s log n + b for all components: two hidden units hold log n, since GELU(x) - GELU(-x) =
    x, and the last layer of MLP(q) is zero.

    Args:
        num_heads: query heads, H.
        head_size: D.
        hidden_size: hidden size of both networks, 2 to 65,536.
        s: starting value of s. Default: ssmax.matched_scale(1024).
        b: starting value of b; s = 0 and b = 1 is softmax.

    Raises:
        ValueError: a size is not a positive integer, or s or b is not a finite number.

    Example:
        >>> scale = QueryAwareScale(num_heads=8, head_size=64)
        >>> query = scale(query, n=ssmax.visible_keys(num_keys=1024))  # (B, 8, 1024, 64)
    """

    law = "query-aware"

    def __init__(
        self, num_heads: int, head_size: int, hidden_size: int = 64, s: float = matched_scale(1024), b: float = 0.0
    ):
        super().__init__()
        sizes = {"num_heads": num_heads, "head_size": head_size, "hidden_size": hidden_size}
        # Numbers of the command line come as 64.0.
        wrong = [name for name, size in sizes.items() if not is_number(size) or size != int(size) or size < 1]
        if wrong or not 2 <= hidden_size <= WIDEST:
            name = (*wrong, "hidden_size")[0]
            raise ValueError(f"{name} must be a positive integer, hidden_size 2 to {WIDEST}, got {sizes[name]!r}")
        if not is_number(s) or not is_number(b):
            raise ValueError(f"s and b must be finite numbers, got {s!r} and {b!r}")
        self.num_heads, self.head_size, hidden_size = int(num_heads), int(head_size), int(hidden_size)
        self.init_s, self.init_b = float(s), float(b)
        layer = functools.partial(nn.Linear, dtype=torch.float32)
        self.of_n: Any = nn.Sequential(
            layer(1, hidden_size), nn.GELU(), layer(hidden_size, self.num_heads * self.head_size)
        )
        self.of_query: Any = nn.Sequential(
            layer(self.head_size, hidden_size), nn.GELU(), layer(hidden_size, self.head_size)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let both networks compute s log n + b. Hidden units that add nothing yet are initialised as in torch."""
        for network in (self.of_n, self.of_query):
            first, _, last = network
            first.reset_parameters()
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        first, _, last = self.of_n
        for unit, sign in enumerate((1.0, -1.0)):
            first.weight[unit].fill_(sign)
            first.bias[unit].fill_(0.0)
            last.weight[:, unit].fill_(sign * self.init_s)
        last.bias.fill_(self.init_b)

    def forward(self, query: Tensor, n: Tensor | int, log_n: Tensor | None = None) -> Tensor:
        """Return the scaled query in query's dtype, computed in float32 (float64 for float64) and rounded once.

        Args:
            query: (B, H, N, D).
            n: see SSMaxScale.
            log_n: see SSMaxScale.

        Raises:
            ValueError: a query or n of another shape.
        """
        if query.ndim != 4 or (query.shape[1], query.shape[3]) != (self.num_heads, self.head_size):
            raise ValueError(f"query must be (B, {self.num_heads}, N, {self.head_size}), got {tuple(query.shape)}")
        self.check_query(query, self.num_heads)
        log_n_BHN1 = log_visible(rows_of(n, query), query) if log_n is None else log_n
        with _no_autocast(query):
            wide = query.to(torch.promote_types(log_n_BHN1.dtype, self.of_n[0].weight.dtype))
            first, _, last = self.of_n
            hidden = _affine(log_n_BHN1.to(wide.dtype), first)
            weight_HKD = last.weight.to(wide.dtype).unflatten(0, (self.num_heads, self.head_size)).transpose(1, 2)
            base = gelu(hidden) @ weight_HKD + last.bias.to(wide.dtype).view(self.num_heads, 1, self.head_size)
            first, _, last = self.of_query
            gate = 1 + _affine(gelu(_affine(wide, first)), last).tanh()
            return (wide * (base * gate)).to(query.dtype)

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return f"{self.law}: {sum(p.numel() for p in self.parameters()):,} parameters"


def _affine(x, layer):
    return linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _no_autocast(query):
    kind = query.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
