"""Contenders in alternation: each is compared with the float64 reference first, then its time with plain attention's."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ssmax.runs.rows import Row
from ssmax.versions import __version__

__all__ = ["PLAIN", "Case", "Comparison", "compare", "largest_error", "peak_memory", "row", "run"]

PLAIN = "plain"


@dataclass(frozen=True)
class Comparison:
    """Contenders for the same work.

    Attributes:
        at: coordinates of its rows, such as {"length": 4096, "pass": "forward"}.
        contenders: calls by name; the one named base is what the others are divided by.
        repeats: rounds; each contender runs once in a round.
        errors: measures the largest error of a contender; one without it is not compared.
        allowed: error up to which a contender is right.
        base: "plain", where there is a plain one.
        memory: measure peak memory as well.
    """

    at: dict[str, Any]
    contenders: dict[str, Callable[[], Any]]
    repeats: int
    errors: dict[str, Callable[[], float]] = field(default_factory=dict)
    allowed: float = 1e-5
    base: str = PLAIN
    memory: bool = False


@dataclass(frozen=True)
class Case:
    """A named case: what it measures, its minutes on two cores, and its comparisons (or finished rows), one by one.

    dry_run yields lines of what can be checked without measuring.
    """

    about: str
    minutes: float
    comparisons: Callable[..., Iterator[Comparison | Row]]
    dry_run: Callable[[], Iterator[str]] | None = None


def run(case: Case, **options: Any) -> Iterator[Row]:
    """Yield the rows of a case as they are measured; options are the case's own."""
    for comparison in case.comparisons(**options):
        if isinstance(comparison, Row):
            yield comparison
        else:
            yield from compare(comparison)


def compare(comparison: Comparison) -> Iterator[Row]:
    """Yield error, seconds, time_ratio, cpu_ratio and peak_bytes of each contender; of a wrong one the error alone.

    cpu_ratio is the same of the process's own time on all cores: what a busy machine leaves comparable.
    """
    base, at, right = comparison.base, comparison.at, {}
    for name, call in comparison.contenders.items():
        error = comparison.errors[name]() if name in comparison.errors else 0.0
        if name in comparison.errors:
            yield row("error", name, {**at, "allowed": comparison.allowed}, min(error, 1e300), 1)
        if error <= comparison.allowed:
            right[name] = call
    if base not in right:
        return
    times, cpu = _alternate(right, comparison.repeats, ", ".join(map(str, at.values())))
    for name, values in times.items():
        # What slows a whole round down cancels in the round's own ratio.
        ratios, of_cpu = (
            [mine / max(plain, 1e-9) for mine, plain in zip(of[name], of[base], strict=True)] for of in (times, cpu)
        )
        measured = (("seconds", values), ("time_ratio", ratios), ("cpu_ratio", of_cpu))
        for metric, found in measured[: 1 if name == base else 3]:
            low, middle, high = statistics.quantiles(found, n=4)
            yield row(metric, name, {**at, "low": low, "high": high}, middle, len(found))
        if comparison.memory:
            yield row("peak_bytes", name, at, peak_memory(right[name]), 1)


def _alternate(contenders, rounds, name):
    """Times of each contender on the wall and on the CPU, once a round, there and back again, after one round not counted."""
    times, cpu = ({name: [] for name in contenders} for _ in range(2))
    for call in contenders.values():
        call()
    for turn in tqdm(range(rounds), desc=name, leave=False, disable=None):
        for contender in list(contenders)[:: 1 if turn % 2 else -1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            contenders[contender]()
            times[contender].append(time.perf_counter() - start)
            cpu[contender].append(time.process_time() - start_cpu)
    return times, cpu


def peak_memory(call):
    """Bytes that a call allocates at its peak beyond what was there, from torch's own profiler (CPU)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints a line at each start and stop otherwise
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    found: Any = recorded.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def largest_error(got: Tensor, exact: Tensor) -> float:
    """Return the largest difference; infinite where something is not a number."""
    return (got.double() - exact).abs().nan_to_num(torch.inf).max().item()


def row(metric: str, variant: str, at: dict[str, Any], value: float, samples: int) -> Row:
    """Return a row with versions and hardware."""
    provenance = {
        "ssmax": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Row(metric, variant, None, at, value, samples, provenance)
