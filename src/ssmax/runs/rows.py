"""Rows: each is one measured number with its provenance, and one JSON object a line in a file. No torch."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssmax.errors import Damaged
from ssmax.runs.files import check_file, write_atomically, write_checked


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        metric: what was measured, such as train_loss or retrieval_accuracy.
        variant: a letter of ssmax.paper.models.VARIANTS, or a model's name.
        seed: seed of initial weights and data order; None if no seed is involved.
        at: coordinates, such as {"position": 2048, "theta_factor": 50}.
        value: the number; losses in nats per token.
        samples: how many measurements it is the mean of.
        provenance: recipe, commit, versions, time.
    """

    metric: str
    variant: str
    seed: int | None
    at: dict[str, Any]
    value: float
    samples: int
    provenance: dict[str, Any] = field(default_factory=dict)


def write_rows(path: Path, rows: Iterable[Row], *, checked: bool = False) -> None:
    """Write all rows to path, whole or not at all; an identical file is left untouched.

    Args:
        path: the file.
        rows: all rows of the file.
        checked: write the file's checksum beside it, which read_rows checks.

    Raises:
        ValueError: a value that is not finite.
    """
    rows = list(rows)
    for row in rows:
        if not math.isfinite(row.value):
            raise ValueError(
                f"{row.metric} of {row.variant} at {row.at} is {row.value}; a row holds finite numbers only"
            )
    text = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows)
    if not (is_whole(path, checked=checked) and path.read_text() == text):
        (write_checked if checked else write_atomically)(path, text)


def read_rows(path: Path) -> list[Row]:
    """Read a file of rows.

    Raises:
        Damaged: the file does not match its checksum, or a line is not a row. It is a ValueError.
    """
    check_file(path)
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise Damaged(f"{path}, line {number}, is not a row ({error}); delete the file to measure again") from error
    return rows


def is_whole(path: Path, *, checked: bool = False) -> bool:
    """Return whether a file of rows exists and matches its checksum. checked: without a checksum it does not count."""
    try:
        return path.exists() and (check_file(path) or not checked)
    except (Damaged, FileNotFoundError):
        return False


def _row(content):
    row = Row(**content)
    if not isinstance(row.metric, str) or not isinstance(row.at, dict) or not isinstance(row.provenance, dict):
        raise TypeError("metric, at and provenance must be text and objects")
    if isinstance(row.value, bool) or not isinstance(row.value, (int, float)) or not math.isfinite(row.value):
        raise TypeError(f"value must be a finite number, got {row.value!r}")
    return row
