"""ssmax bench: choose cases, measure them, print tables, write rows and figures."""

import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.figure import Figure

from ssmax.bench import measure
from ssmax.bench.cases import CASES
from ssmax.errors import UserError
from ssmax.plots.drawing import rendered
from ssmax.runs.files import check_destination, write_atomically
from ssmax.runs.rows import Row, write_rows

NEEDS = {
    "peer": "scalable_softmax",
    "generate": "transformers",
    "blocks": "transformers",
    "model": "transformers",
    "evaluation": "transformers",
    "training": "accelerate",
    "scale": "transformers",
    "kernel": "triton",
    "kernel-gradient": "triton",
}  # packages that a case needs
ASKED = {"kernel", "kernel-gradient"}  # need a GPU, or Triton's interpreter: run only if named


def bench(names: list[str], out: Path, *, dry_run: bool, **generate: Any) -> None:
    """Measure the named cases, or by default all that run on this machine, and write OUT/CASE.jsonl and OUT/CASE.png.

    Args:
        names: cases, keys of CASES.
        out: folder of rows and figures.
        dry_run: list the cases with their minutes, and measure nothing.
        generate: options of the case "generate"; see ssmax.bench.generate.

    Raises:
        UserError: an unknown case, one whose package is missing, or options of a case that is not
            named.
    """
    if generate and "generate" not in names:
        raise UserError(f"--{next(iter(generate))} is an option of the case generate: ssmax bench generate ...")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise UserError(f"there is no case {unknown[0]!r}; cases are {', '.join(CASES)}")
    missing = {name: package for name, package in NEEDS.items() if importlib.util.find_spec(package) is None}
    for name in names:
        if name in missing:
            raise UserError(
                f"case {name!r} needs the package {missing[name]!r}: pip install {missing[name].replace('_', '-')}"
            )
    check_destination(out / "rows")
    chosen = names or [name for name in CASES if name not in missing and name not in ASKED]
    for name in chosen:
        print(f"{name}: {CASES[name].about}; about {CASES[name].minutes:g} min")
        check = CASES[name].dry_run
        if dry_run and check and name in names:
            for line in check():
                print(f"    {line}", flush=True)
        if not dry_run:
            rows = list(measure.run(CASES[name], **(generate if name == "generate" else {})))
            print(table(rows))
            write_rows(out / f"{name}.jsonl", rows)
            if any(row.metric == "time_ratio" for row in rows):
                write_atomically(out / f"{name}.png", rendered(functools.partial(figure, name, rows), "png")[0])
            print(f"Rows: {(out / name).resolve()}.jsonl\n")
    if dry_run:
        skipped = "".join(
            f"\n{name} is left out: the package {missing[name]} is missing" for name in missing if not names
        )
        print(f"dry run: nothing was measured{skipped}")


def table(rows: Iterable[Row]) -> str:
    """Return the rows as lines for a terminal: each comparison, with the results of each contender below it."""
    lines, shown = [], None
    for place, contender, found in _by_contender(rows):
        if place != shown:
            lines.append(place)
            shown = place
        lines.append(f"    {contender:<26}{_words(found)}")
    return "\n".join(lines)


def _words(found):
    if "seconds" not in found and "time_ratio" not in found and "error" in found:
        error = found["error"]
        return f"WRONG: error {error.value:.1e}, allowed {error.at['allowed']:.1e}; no speed"
    words = []
    for metric, row in found.items():
        spread = f" ({row.at['low']:.3g} to {row.at['high']:.3g})" if "low" in row.at else ""
        if metric == "time_ratio":
            words.append(f"x {row.value:.3f} ({row.at['low']:.3f} to {row.at['high']:.3f})")
        elif metric == "cpu_ratio":
            words.append(f"CPU x {row.value:.3f} ({row.at['low']:.3f} to {row.at['high']:.3f})")
        elif metric == "seconds":
            words.append(f"{1e3 * row.value:.4g} ms")
        elif metric == "peak_bytes":
            words.append(f"peak {row.value / 2**20:,.1f} MiB")
        elif metric == "error":
            words.append(f"error {row.value:.0e}")
        else:
            words.append(f"{metric.replace('_', ' ')} {row.value:.3g}{spread}")
    return ", ".join(words)


def _by_contender(rows):
    """(comparison in words, contender, its rows by metric), in order."""
    found = {}
    for row in rows:
        place = ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{v}" for k, v in row.at.items() if k not in AROUND)
        found.setdefault((place, row.variant), {})[row.metric] = row
    order = list(dict.fromkeys(place for place, _ in found))
    return sorted(((place, who, metrics) for (place, who), metrics in found.items()), key=lambda x: order.index(x[0]))


AROUND = ("low", "high", "allowed", "formula", "heads")


def figure(name: str, rows: list[Row]) -> Figure:
    """Draw the ratios of a case: a line for each contender of each comparison, median and quartiles."""
    ratios = [(place, who, found["time_ratio"]) for place, who, found in _by_contender(rows) if "time_ratio" in found]
    contenders = list(dict.fromkeys(who for _, who, _ in ratios))
    drawn = Figure(figsize=(8, 1.4 + 0.24 * len(ratios)))
    axis = drawn.add_subplot()
    for i, (_, who, row) in enumerate(ratios):
        low, high = row.value - row.at["low"], row.at["high"] - row.value
        axis.errorbar(
            row.value, i, xerr=[[max(0, low)], [max(0, high)]], fmt="o", ms=4, color=f"C{contenders.index(who)}"
        )
    axis.axvline(1, color="0.4", lw=1)
    axis.set_yticks(range(len(ratios)), [f"{place}: {who}" for place, who, _ in ratios])
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ends = [row.value for _, _, row in ratios]
    ticks = [x for x in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if min(ends) / 2 <= x <= max(ends) * 2]
    axis.set_xticks(ticks)
    axis.set(xlabel="time / time of the base")
    axis.invert_yaxis()
    drawn.suptitle(f"{name}: {min(ends):.2f} to {max(ends):.2f} of the base's time (medians, quartiles)", fontsize=10)
    return drawn
