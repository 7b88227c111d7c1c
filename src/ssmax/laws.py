"""The laws of n, one entry each: the multiplier m of the logits in softmax(m z), as a function of n or of the position.

To add a law, add its entry to LAWS. Backends do not know laws: m is folded into the query. The
modules that do this are QueryScales; make_scale returns the one of a law.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssmax.arguments import is_readable, whole_number
from ssmax.query_scale import QueryAwareScale, QueryScale, is_number, own_part
from ssmax.scaling import matched_scale, scale_query
from ssmax.visible import rows_of


@dataclass(frozen=True)
class Law:
    """One law of n.

    Attributes:
        formula: m as a formula; n is the number of visible keys, p the position in the document,
            from 0.
        of: what m depends on: "n", "p", or "query" if it depends on the query as well.
        source: where the law is used.
        function: (n or p in float32 or float64, parameters) -> m. For "query": its class of
            QueryScale. Saved models carry the function's source: a def that uses torch and math
            alone, or a function of torch.
        defaults: the parameters with the values of the source; learned parameters start there. None
            must be given, except that convert sets s (see matched_start).
        learned: names of the parameters that a LawScale learns, one number for each head.
            (SSMaxScale learns s and b.)
        instead: what to give convert for this law, where it is not taken by its name.
    """

    formula: str
    of: str
    source: str
    function: Callable[..., Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    learned: tuple[str, ...] = ()
    instead: str = ""

    def __call__(self, x: Tensor, **parameters: Any) -> Tensor:
        """Return m for n or p of any shape, float32 (float64 for float64).

        Args:
            x: n or p, see `of`; integers or floating point. n = 0 counts as 1.
            parameters: some of `defaults`, numbers or tensors that broadcast against x.

        Raises:
            ValueError: an unknown parameter, a missing parameter without a default, or a law of the
                query.
        """
        if self.of == "query":
            raise ValueError(f"the law {self.formula!r} depends on the query; use its module, {self.function.__name__}")
        chosen = self.chosen(parameters)
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return self.function(wide.clamp(min=1) if self.of == "n" else wide, **chosen)

    def chosen(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return all parameters of the law: the given ones, and defaults for the others. Raise ValueError as in a call."""
        unknown = set(parameters) - set(self.defaults)
        chosen = {**self.defaults, **parameters}
        missing = [name for name, value in chosen.items() if value is None]
        if unknown or missing:
            raise ValueError(
                f"the law {self.formula!r} takes {', '.join(self.defaults) or 'no parameters'}"
                + "".join(f"; it does not take {name}" for name in sorted(unknown))
                + "".join(f"; {name} is missing" for name in missing)
            )
        return chosen


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


def _power(n, s, gamma):
    log_n = n.log()
    # One key: m = 0, for which gamma has no gradient. 0 ** gamma has an infinite one, or is infinite itself.
    several = log_n > 0
    return torch.where(several, s * torch.where(several, log_n, 1.0) ** gamma, 0.0)


def _temperature(n, t):
    return t * torch.ones_like(n)


class LawScale(QueryScale):
    """Multiply each query by a law of n. Each learned parameter of the law is a module parameter of its name, (H,), float32.

    A law of the position p gets p = n - 1. This is right for full causal attention, padded or
    packed, and not for windows.

    Args:
        law: a name in LAWS, except laws of the query.
        num_heads: number of query heads, H; needed only if the law learns something.
        parameters: parameters of the law, finite numbers. Learned parameters start there.

    Raises:
        ValueError: an unknown law, or parameters that do not fit it.

    Example:
        >>> scale = LawScale("ssmax-power", num_heads=8, s=0.43, gamma=0.5)
        >>> query = scale(query, n=ssmax.visible_keys(num_keys=1024))  # (B, 8, 1024, D)
    """

    def __init__(self, law: str, num_heads: int | None = None, **parameters: float):
        super().__init__()
        if law not in LAWS:
            raise ValueError(f"law must be one of {', '.join(LAWS)}, got {law!r}")
        self.law, self.fixed = law, LAWS[law].chosen(parameters)
        odd = [name for name, value in self.fixed.items() if not is_number(value)]
        if odd:
            raise ValueError(f"law {law!r} takes finite numbers, got {odd[0]} = {self.fixed[odd[0]]!r}")
        x = 2.0 ** torch.arange(41, device="cpu") - int(LAWS[law].of == "p")
        shown = ", ".join(f"{name} = {value!r}" for name, value in self.fixed.items())
        problem = f"law {law!r} is not a finite number for every n up to 2^40 with {shown}"
        try:
            m = LAWS[law](x, **parameters)
        except (ArithmeticError, ValueError) as error:  # of Python's own functions
            raise ValueError(f"{problem}: {error}") from error
        if is_readable(m) and not m.isfinite().all():
            raise ValueError(problem)
        self.starts = {name: float(self.fixed.pop(name)) for name in LAWS[law].learned}
        for name in self.starts:
            heads = whole_number(num_heads, "num_heads", 1)
            self.register_parameter(name, nn.Parameter(torch.empty(heads, dtype=torch.float32)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the learned parameters to their starting values."""
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, self.starts[name])

    def forward(self, query: Tensor, n: Tensor | int, log_n: Tensor | None = None) -> Tensor:
        """Return the scaled query in its dtype, rounded once. Arguments as in SSMaxScale; log_n is not used."""
        law, n_BHN = LAWS[self.law], rows_of(n, query)
        learned_H1 = {name: own_part(parameter).view(-1, 1) for name, parameter in self.named_parameters()}
        if learned_H1:
            self.check_query(query, len(next(iter(learned_H1.values()))))
        x = n_BHN if law.of == "n" else (n_BHN - 1).clamp(min=0)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        m = law(x.to(wide), **self.fixed, **learned_H1)
        return scale_query(query, m.expand(-1, -1, query.shape[2]))

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return f"{self.law}: {LAWS[self.law].formula}"


LAWS: dict[str, Law] = {
    "softmax": Law("1", "n", "the plain Transformer", torch.ones_like, instead="the model as it is"),
    "ssmax": Law("s log n + b", "n", "arXiv 2501.19399, (b) and (d)", _ssmax, {"s": None, "b": 0.0}),
    "ssmax-fixed": Law("log n", "n", "arXiv 2501.19399, (c)", torch.log),
    "mistral-large-4": Law(
        "s log(p + 1) + b",
        "p",
        "Mistral Large 4",
        lambda p, s, b: _ssmax(p + 1, s, b),
        {"s": 0.0, "b": 1.0},
        instead="init='identity'",
    ),
    "olmo": Law(
        "s log n",
        "n",
        "OLMo 3.5; n restarts in each packed document",
        lambda n, s: s * n.log(),
        {"s": 1.0},
        instead="init=1.0",
    ),
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
    "ssmax-power": Law(
        "s (log n)^gamma", "n", "s log n with a free exponent", _power, {"s": None, "gamma": 1.0}, ("s", "gamma")
    ),
    "query-aware": Law(
        "MLP(log n) (1 + tanh(MLP(q)))",
        "query",
        "TabICLv2, which multiplies each component of the query by its own number",
        QueryAwareScale,
        {"s": None, "b": 0.0, "hidden_size": 64},
    ),
    "temperature": Law("t", "n", "a control: a learned temperature without n", _temperature, {"t": 1.0}, ("t",)),
}


def matched_start(law: str, train_length: int, **parameters: float) -> float:
    """Return the s at which a law is on average 1 over the training length, as sharp as Softmax.

    The law must be proportional to s. For s log n it is matched_scale(train_length), and so it is for
    "query-aware", which starts as s log n.

    Args:
        law: a name in LAWS.
        train_length: context length of the training, in tokens.
        parameters: the other parameters of the law.

    Example:
        >>> matched_start("ssmax-power", 1024, gamma=0.5)
        0.412...
    """
    if LAWS[law].of == "query":
        return matched_scale(train_length)
    first = 1 if LAWS[law].of == "n" else 0
    x = torch.arange(first, first + train_length, dtype=torch.float64)
    return train_length / LAWS[law](x, **parameters, s=1.0).sum().item()


def make_scale(law: str, num_heads: int, head_size: int, **parameters: float) -> QueryScale:
    """Return the module of a law for one attention layer. Call it on the query, with n, as SSMaxScale.

    Args:
        law: a name in LAWS.
        num_heads: number of query heads, H.
        head_size: size of a head, D.
        parameters: parameters of the law.

    Returns:
        A LawScale, or a QueryAwareScale for the law "query-aware".

    Raises:
        ValueError: an unknown law, or parameters that do not fit it.

    Example:
        >>> from ssmax.laws import make_scale
        >>> scale = make_scale("ssmax-power", num_heads=8, head_size=64, s=0.43)
        >>> query = scale(query, n=ssmax.visible_keys(num_keys=1024))  # (B, 8, 1024, 64)
    """
    if law in LAWS and LAWS[law].of == "query":
        return LAWS[law].function(num_heads, head_size, **LAWS[law].chosen(parameters))
    return LawScale(law, num_heads, **parameters)
