"""ScaleSpec, the content of config.ssmax: a model's law, where its scales start, and the layers that carry them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ssmax.hf.layers import Layer
from ssmax.laws import LAWS, make_scale
from ssmax.nn import SSMaxScale
from ssmax.query_scale import QueryScale
from ssmax.versions import __version__

# What versions before wrote for law "ssmax".
OLD_LAWS = ("s log n", "s log n + b", "log n (s is folded into q_proj)")


@dataclass(frozen=True)
class ScaleSpec:
    """The scales of a converted model, as config.ssmax holds them in JSON.

    The law "ssmax" has init, s, b and bias, other laws have parameters instead. Both are starting
    values; learned values are in the weights.

    Attributes:
        law: a name in ssmax.laws.LAWS.
        layers: indices of decoder layers; in other models, and with cross attention, names of attention
            modules.
        version: version of ssmax that converted the model; ssmax inspect shows it.
        init: the init of convert: "matched", "identity" or a number.
        s: starting value of s of each head; 1 after ssmax.fold.
        b: starting value of b of each head.
        bias: whether b is learned.
        parameters: parameters of another law, with their starting values.
        folded: ssmax.fold has multiplied q_proj by s and set s to 1.
        calibrated_at: length in tokens of the texts on which ssmax.calibrate fitted s and b, for the reader alone.
    """

    law: str
    layers: list[int | str]
    version: str
    init: str | float | None = None
    s: float | None = None
    b: float | None = None
    bias: bool | None = None
    parameters: Mapping[str, Any] | None = None
    folded: bool | None = None
    calibrated_at: int | None = None

    @classmethod
    def of(cls, config: Any, kind: type) -> "ScaleSpec":
        """Read the spec from a config, also one that an earlier version wrote.

        Args:
            config: config of a model.
            kind: the model's class, for messages.

        Raises:
            ValueError: config.ssmax is missing or damaged.
        """
        held = getattr(config, "ssmax", None)
        if held is None:
            raise ValueError(
                f"config.ssmax is missing: {kind.__name__} cannot know its scales; convert the model again"
            )
        learned = isinstance(held, dict) and "s" in held
        fields = {"law", "layers", "version", *(("s", "b", "bias") if learned else ("parameters",))}
        if not isinstance(held, dict) or not fields <= set(held) or (learned and "parameters" in held):
            raise ValueError(
                f"config.ssmax must hold {', '.join(sorted(fields))}; got {held!r}; convert the model again"
            )
        layers = held["layers"]
        keys = isinstance(layers, (list, tuple)) and layers and all(type(key) in (int, str) for key in layers)
        if not keys or len(set(layers)) < len(layers):
            raise ValueError(f"config.ssmax must name layers, each once; got {layers!r}; convert the model again")
        if learned and not (
            type(held["bias"]) is bool
            and all(type(held[name]) in (int, float) and math.isfinite(held[name]) for name in ("s", "b"))
        ):
            raise ValueError(
                f"config.ssmax must hold finite numbers s and b and bias true or false; got {held!r}; convert the model again"
            )
        spec = cls(**{name: held[name] for name in cls.__dataclass_fields__ if name in held})
        if spec.law == "ssmax" or (not learned and spec.law in LAWS):
            return spec
        if not learned or spec.law not in OLD_LAWS:
            raise ValueError(
                f"config.ssmax has law {spec.law!r}, which ssmax {__version__} does not know; install a newer ssmax, or convert the model again"
            )
        return replace(spec, law="ssmax", folded=True if "folded" in str(spec.law) else None)

    def held(self) -> dict[str, Any]:
        """Return the spec as the JSON object for config.ssmax."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        """Return the law and where it starts, in words."""
        if self.parameters is None:
            law = "log n (s is folded into q_proj)" if self.folded else "s log n + b" if self.bias else "s log n"
            return f"law {law}, init {self.init}"
        started = ", ".join(f"{name} {value:g}" for name, value in self.parameters.items())
        return f"law {self.law}, {started or 'no parameters'}"

    def make(self, layer: Layer) -> QueryScale:
        """Return the scale of a layer, with its starting values."""
        if self.s is not None and self.bias is not None and self.b is not None:  # law "ssmax"
            return SSMaxScale(layer.heads, self.s, self.bias, self.b)
        parameters: Any = self.parameters
        return make_scale(self.law, layer.heads, layer.head_size, **parameters)
