"""How the tests run side by side, and what was broken on purpose, how often, and what was lost: rows for docs/faults.md."""

import dataclasses
import getpass
import os
import platform
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import hypothesis
import pytest

# No test fails for being slow: how long an example takes says more about the machine.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker; torch reads this when it is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch keeps compiled kernels by their source alone: those of another instruction set would not build.
KERNELS = f"torchinductor_{getpass.getuser()}_{os.environ.get('ATEN_CPU_CAPABILITY', 'own')}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), KERNELS)))

from ssmax.runs.rows import Row, read_rows, write_rows  # noqa: E402 (torch reads the environment when it is loaded)
from ssmax.sharp import keys  # noqa: E402

ROWS = []
# Files of the marker numerical: make test-processors runs them again with fewer of the processor's instructions.
NUMERICAL = {"chunks", "functional", "hf", "laws", "nn", "scaling", "serving", "sharp", "sharp_cache", "triton"}


def pytest_addoption(parser):
    parser.addoption(
        "--faults", type=Path, help="file of rows for docs/faults.md, renewed where a fault was tried again"
    )


def pytest_xdist_auto_num_workers():
    """One worker for each core that this process may use, and at most four: each takes up to a gigabyte."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def pytest_itemcollected(item):
    if item.path.stem.removeprefix("test_") in NUMERICAL:
        item.add_marker(pytest.mark.numerical)


@pytest.fixture
def exact_int8(monkeypatch):
    """Where the processor's int8 product saturates, there is no screen: multiply otherwise, so that the screen is tested everywhere."""
    if not keys.int8_is_exact():
        # A sum of products of int8 is below 2^24 up to a head size of 1,024, so that float32 is exact.
        monkeypatch.setattr(keys, "int8_product", lambda query, codes, out: out.copy_(query.float() @ codes.float().T))
        keys.int8_is_exact.cache_clear()
    yield
    keys.int8_is_exact.cache_clear()


@pytest.fixture
def record(request):
    """record(fault, tried, lost): how often a fault was tried, and how often anything was lost by it."""

    def write(fault, tried, lost=0, **at):
        test = f"{request.node.path.relative_to(request.config.rootpath)}::{request.node.name.partition('[')[0]}"
        versions = {name: metadata.version(name) for name in ("torch", "transformers")}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        provenance = {"command": "make test-faults", **versions, "python": platform.python_version(), "time": now}
        row = Row("lost", fault, None, {"test": test, **at}, lost, tried, provenance)
        request.node.user_properties.append(("fault", dataclasses.asdict(row)))
        assert lost == 0

    return write


def pytest_runtest_logreport(report):
    """Reports reach the process that started the workers, and so do the rows in them."""
    if report.when == "call":
        ROWS.extend(Row(**fields) for name, fields in report.user_properties if name == "fault")


def pytest_sessionfinish(session):
    path = session.config.getoption("--faults")
    if path is not None and ROWS and not hasattr(session.config, "workerinput"):
        found = {row.variant: row for row in (read_rows(path) if path.exists() else ())}
        for fault in {row.variant for row in ROWS}:
            rows = [row for row in ROWS if row.variant == fault]
            found[fault] = dataclasses.replace(rows[0], samples=sum(row.samples for row in rows))
        write_rows(path, [found[fault] for fault in sorted(found)])
