"""How ssmax bench measures: each contender is compared with the float64 reference first, then timed in alternation."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ssmax.runs.rows import Row
from ssmax.versions import __version__

PLAIN = "plain"


@dataclass(frozen=True)
class Comparison:
    """Contenders for the same work.

    Attributes:
        at: coordinates of its rows, such as {"length": 4096, "pass": "forward"}.
        contenders: calls by name.
        repeats: number of rounds; each contender runs once in a round.
        errors: for each contender, a function that returns its largest error. Contenders without
            one are not checked.
        allowed: largest error at which a contender still counts as right.
        base: name of the contender by whose time the others are divided.
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
    """A named case of ssmax bench.

    Attributes:
        about: what it measures, for the list of cases.
        minutes: its time on two cores.
        comparisons: yields its comparisons, or finished rows.
        dry_run: yields lines about what can be checked without measuring.
    """

    about: str
    minutes: float
    comparisons: Callable[..., Iterator[Comparison | Row]]
    dry_run: Callable[[], Iterator[str]] | None = None


def run(case: Case, **options: Any) -> Iterator[Row]:
    """Yield the rows of a case as they are measured; options go to the case."""
    for comparison in case.comparisons(**options):
        if isinstance(comparison, Row):
            yield comparison
        else:
            yield from compare(comparison)


def compare(comparison: Comparison) -> Iterator[Row]:
    """Yield error, seconds, time_ratio, cpu_ratio and peak_bytes of each contender; for a wrong one only the error.

    cpu_ratio is the ratio of CPU times, over all cores: it stays comparable on a machine that runs
    other programs.
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
    times, cpu = alternate(right, comparison.repeats, ", ".join(map(str, at.values())))
    for name, values in times.items():
        # What slows down a whole round cancels in the ratio of that round.
        ratios, of_cpu = (
            [mine / max(plain, 1e-9) for mine, plain in zip(of[name], of[base], strict=True)] for of in (times, cpu)
        )
        measured = (("seconds", values), ("time_ratio", ratios), ("cpu_ratio", of_cpu))
        for metric, found in measured[: 1 if name == base else 3]:
            low, middle, high = statistics.quantiles(found, n=4)
            yield row(metric, name, {**at, "low": low, "high": high}, middle, len(found))
        if comparison.memory:
            yield row("peak_bytes", name, at, peak_memory(right[name]), 1)


def alternate(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, name: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return wall and CPU times of each contender, one for each round, after a warm-up. The order alternates."""
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
    """Return the bytes that a call allocates at its peak, beyond those before the call, by torch's profiler (CPU)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints a line at each start and stop
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
    """Return the largest absolute difference; infinite if a value is not a number."""
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
