"""The laws of n in use: what multiplies the logits, as a function of n or of the position. No backend knows them.

Each is m in softmax(m z). Fold it into the query: ssmax.scaling.scale_query(query, m).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssmax.scaling import scale_query
from ssmax.visible import rows_of

__all__ = ["LAWS", "Law", "LawScale", "QueryAwareScale"]


@dataclass(frozen=True)
class Law:
    """One law of n.

    Attributes:
        formula: in words of mathematics; n visible keys, p = 0-based position in the document.
        of: "n" or "p", what the function wants.
        source: where it is used.
        defaults: its parameters at the values of that source; those that are learned start there.
        function: (x in float32 or float64, parameters) -> m.
    """

    formula: str
    of: str
    source: str
    function: Callable[..., Tensor]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor, **parameters: Any) -> Tensor:
        """Return m for n or p of any shape, float32 (float64 for float64).

        Args:
            x: n or p, see `of`; integers or floating point. n = 0 counts as 1.
            parameters: some of `defaults`, numbers or tensors that broadcast against x.

        Raises:
            ValueError: an unknown parameter, or one that is needed and has no default.
        """
        unknown = set(parameters) - set(self.defaults)
        chosen = {**self.defaults, **parameters}
        missing = [name for name, value in chosen.items() if value is None]
        if unknown or missing:
            raise ValueError(
                f"the law {self.formula!r} takes {', '.join(self.defaults) or 'no parameters'}; "
                f"got {', '.join(sorted(unknown)) or 'nothing'} too much, {', '.join(missing) or 'nothing'} missing"
            )
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return self.function(wide.clamp(min=1) if self.of == "n" else wide, **chosen)


def _ssmax(n, s, b):
    return s * n.log() + b


def _llama4(p, scale, floor):
    return 1 + scale * torch.log1p(torch.floor((p + 1) / floor))


def _ministral(p, scale, length):
    return 1 + scale * torch.log1p(torch.floor(p / length))


def _log_length(n, train_length):
    return (n.log() / math.log(train_length)).clamp(min=1)


def _yarn(n, factor):
    return torch.full_like(n, (0.1 * math.log(factor) + 1) ** 2)


LAWS: dict[str, Law] = {
    "softmax": Law("1", "n", "the plain Transformer", torch.ones_like),
    "ssmax": Law("s log n + b", "n", "arXiv 2501.19399, (b) and (d)", _ssmax, {"s": None, "b": 0.0}),
    "ssmax-fixed": Law("log n", "n", "arXiv 2501.19399, (c)", torch.log),
    "mistral-large-4": Law(
        "s log(p + 1) + b", "p", "Mistral Large 4", lambda p, s, b: _ssmax(p + 1, s, b), {"s": 0.0, "b": 1.0}
    ),
    "olmo": Law("s log n", "n", "OLMo 3.5; n restarts in each packed document", lambda n, s: s * n.log(), {"s": 1.0}),
    "llama-4": Law(
        "1 + a log(floor((p + 1) / f) + 1)", "p", "Llama 4, layers without RoPE", _llama4, {"scale": 0.1, "floor": 8192}
    ),
    "ministral-3": Law("1 + a log(1 + floor(p / L))", "p", "Ministral 3", _ministral, {"scale": 0.1, "length": 16384}),
    "qwen-1": Law("max(1, log n / log L)", "n", "Qwen 1, logn attention", _log_length, {"train_length": 2048}),
    "yarn": Law(
        "(0.1 log(factor) + 1)^2",
        "n",
        "YaRN, arXiv 2309.00071: the factor is on queries and keys",
        _yarn,
        {"factor": None},
    ),
}


class LawScale(nn.Module):
    """Multiply each query by a law of n that has nothing to learn; it holds no parameters and no buffers.

    A law of the position p gets p = n - 1: right for causal attention in full, padded or packed, not for windows.

    Args:
        law: a name in LAWS.
        parameters: as the law takes them; numbers.

    Raises:
        ValueError: an unknown law, or parameters that do not fit it.
    """

    def __init__(self, law: str, **parameters: float):
        super().__init__()
        if law not in LAWS:
            raise ValueError(f"law must be one of {', '.join(LAWS)}, got {law!r}")
        self.law, self.parameters_of_law = law, parameters
        LAWS[law](torch.ones(1), **parameters)

    def forward(self, query: Tensor, n: Tensor | int, log_n: Tensor | None = None) -> Tensor:
        """Return the scaled query in query's dtype, rounded once; arguments as SSMaxScale's, log_n is not used."""
        law, n_BHN = LAWS[self.law], rows_of(n, query)
        x = n_BHN if law.of == "n" else (n_BHN - 1).clamp(min=0)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        return scale_query(query, law(x.to(wide), **self.parameters_of_law).expand(-1, -1, query.shape[2]))

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return f"{self.law}: {LAWS[self.law].formula}"


class QueryAwareScale(nn.Module):
    """TabICLv2's law: each component of the query is multiplied by MLP(log n) (1 + tanh(MLP(q))).

    Both networks have one hidden layer with GELU. The second one's last layer starts at zero, so that training starts
    from a law of n alone.

    Args:
        num_heads: query heads, H.
        head_size: D.
        hidden_size: of both networks.
    """

    def __init__(self, num_heads: int, head_size: int, hidden_size: int = 64):
        super().__init__()
        self.num_heads, self.head_size = num_heads, head_size
        self.of_n = nn.Sequential(nn.Linear(1, hidden_size), nn.GELU(), nn.Linear(hidden_size, num_heads * head_size))
        self.of_query = nn.Sequential(nn.Linear(head_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, head_size))
        last: Any = self.of_query[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, query: Tensor, n: Tensor) -> Tensor:
        """Return the scaled query, (B, H, N, D) in its own dtype; n is (N,) or (B or 1, N).

        Raises:
            ValueError: a query or n of another shape.
        """
        if query.ndim != 4 or (query.shape[1], query.shape[3]) != (self.num_heads, self.head_size):
            raise ValueError(f"query must be (B, {self.num_heads}, N, {self.head_size}), got {tuple(query.shape)}")
        n_BN = torch.atleast_2d(torch.as_tensor(n, device=query.device))
        if (
            n_BN.ndim != 2
            or (n_BN.shape[0] != 1 and n_BN.shape[0] != query.shape[0])
            or n_BN.shape[1] != query.shape[2]
        ):
            raise ValueError(f"n must be (N,) or (B, N) with N = {query.shape[2]}, got {tuple(n_BN.shape)}")
        weight: Any = self.of_n[0].weight
        log_n = n_BN.clamp(min=1).to(torch.float32).log()[..., None].to(weight.dtype)
        base = self.of_n(log_n).unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)
        gate = 1 + torch.tanh(self.of_query(query.to(weight.dtype)))
        return (query * (base * gate)).to(query.dtype)
