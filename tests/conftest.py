"""What was broken on purpose, how often, and what was lost: rows for docs/faults.md."""

import dataclasses
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import pytest

from ssmax.results import Row, read_rows, write_rows

ROWS = []


def pytest_addoption(parser):
    parser.addoption(
        "--faults", type=Path, help="file of rows for docs/faults.md, renewed where a fault was tried again"
    )


@pytest.fixture
def record(request):
    """record(fault, tried, lost): how often a fault was tried, and how often anything was lost by it."""

    def write(fault, tried, lost=0, **at):
        test = f"tests/{request.node.fspath.basename}::{request.node.name.partition('[')[0]}"
        versions = {name: metadata.version(name) for name in ("torch", "transformers")}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        provenance = {"command": "make test-faults", **versions, "python": platform.python_version(), "time": now}
        ROWS.append(Row("lost", fault, None, {"test": test, **at}, lost, tried, provenance))
        assert lost == 0

    return write


def pytest_sessionfinish(session):
    path = session.config.getoption("--faults")
    if path is not None and ROWS:
        found = {row.variant: row for row in (read_rows(path) if path.exists() else ())}
        for fault in {row.variant for row in ROWS}:
            rows = [row for row in ROWS if row.variant == fault]
            found[fault] = dataclasses.replace(rows[0], samples=sum(row.samples for row in rows))
        write_rows(path, [found[fault] for fault in sorted(found)])
