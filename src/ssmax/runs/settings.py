"""Settings of a run whose fields are options of the command line, and the checks of their values. No torch."""

import math
from dataclasses import field, fields
from typing import Any

from ssmax.errors import UserError


def setting(
    group: str, default: Any, text: str, *, zero: bool = False, empty: bool = False, most: float = math.inf
) -> Any:
    """Return a field of a dataclass of settings.

    Args:
        group: its group of options on the command line.
        default: its default.
        text: its help.
        zero: its numbers may be 0.
        empty: as a tuple it may be empty.
        most: its largest number.
    """
    metadata = {"group": group, "help": text, "zero": zero, "empty": empty, "most": most}
    return field(default=default, metadata=metadata)


def check_fields(settings: Any) -> None:
    """Raise UserError if a number is out of its range, or a tuple is empty or names something twice."""
    for f in fields(settings):
        value, zero, most = getattr(settings, f.name), f.metadata.get("zero", False), f.metadata.get("most", math.inf)
        option = f"--{f.name.replace('_', '-')}" if "help" in f.metadata else "MODEL ..."
        values = value if isinstance(value, tuple) else (value,)
        numbers = [x for x in values if isinstance(x, (int, float))]
        if any(not 0 <= x < math.inf or (x == 0 and not zero) for x in numbers):
            raise UserError(f"{option} must be {'at least 0' if zero else 'positive'} and finite, got {value}")
        most = min(most, 2**63 - 1) if numbers and all(isinstance(x, int) for x in numbers) else most
        if max(numbers, default=0) > most:
            raise UserError(f"{option} must lie in 0 to {most:g}, got {value}")
        if value == () and not f.metadata.get("empty"):
            raise UserError(f"{option} must name at least one, got none")
        if len(set(values)) < len(values):
            raise UserError(f"{option} must name each once, got {' '.join(map(str, values))}")
