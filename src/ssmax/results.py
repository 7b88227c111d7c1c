"""Rows: one measured number each, with all that is needed to trust it. One JSON object a line; no torch here."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Row", "read_rows", "write_atomically", "write_rows"]


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        metric: max_weight, focus_weight, learned_p, train_loss, loss_by_position, retrieval_accuracy, first_digit_accuracy,
            needle_score, top_needle_score, attention_entropy or largest_weight.
        variant: "a" ... "f", or a model's name.
        seed: of initial weights and data order; None for what no seed touches.
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


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows to path, whole or not at all; an identical file is left untouched."""
    text = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows)
    if not (path.exists() and path.read_text() == text):
        write_atomically(path, text)


def read_rows(path: Path) -> list[Row]:
    """Read rows; a line that is not one raises ValueError with its number."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, is not a row ({error}); delete the file to measure anew"
            ) from error
    return rows


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, sync it and rename it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
