"""The provenance in every row: recipe, corpus, commit, versions and machine."""

import dataclasses
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ssmax.runs.folder import versions
from ssmax.runs.rows import Row


def stamped(rows: Sequence[Row], provenance: dict[str, Any]) -> list[Row]:
    """Return the rows with their provenance and the present time."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return [dataclasses.replace(row, provenance=provenance | {"time": now}) for row in rows]


class Meter:
    """Measures a stage in this process: wall seconds, processor seconds, and the process's peak memory so far.

    A stage that continues from a checkpoint is measured from there.
    """

    def __init__(self):
        self.clock, self.processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, Any]:
        """Return seconds, processor_seconds and peak_mib since this meter was made, for the provenance of rows."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "seconds": round(time.perf_counter() - self.clock, 1),
            "processor_seconds": round(time.process_time() - self.processor, 1),
            "peak_mib": peak // 2**20,
        }


def provenance_of(recipe: Any, corpus: str, gpu: str | None) -> dict[str, Any]:
    """Return the provenance of a run's rows.

    Args:
        recipe: a recipe, or other settings with a name.
        corpus: description of the corpus.
        gpu: name of this machine's GPU, or None.
    """
    return {
        "recipe": recipe.name,
        "corpus": corpus,
        "commit": commit(),
        **versions(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {gpu or 'no GPU'}",
    }


def commit() -> str | None:
    """Return the commit of the checkout that holds this package, with + if src has changes; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", ":/src"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")
