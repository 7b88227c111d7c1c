"""The arguments of ssmax.convert as one object."""

from dataclasses import dataclass
from typing import Any

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """The arguments of ssmax.convert, which documents them."""

    init: str | float
    train_length: int | None
    bias: bool | None
    layers: list[int] | list[str] | None
    law: str
    law_parameters: dict[str, float]
    example: Any
    cross: bool
