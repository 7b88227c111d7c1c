"""Writes docs/faults.md from docs/results/faults.jsonl: python docs/faults.py."""

from pathlib import Path

from ssmax.runs.rows import read_rows

DOCS = Path(__file__).parent


def page() -> str:
    """Return the page."""
    rows = read_rows(DOCS / "results" / "faults.jsonl")
    lines = [f"| {row.variant} | {row.samples:,} | {row.value:g} | `{row.at['test']}` |" for row in rows]
    versions = sorted(
        {f"torch {row.provenance['torch']}, transformers {row.provenance['transformers']}" for row in rows}
    )
    calls = [
        f"Of the random calls, {row.at['equal']:,} gave the result of the independent float64 oracle, {row.at['shape']:,} gave its shape and dtype (on the meta "
        f"device), and {row.at['refused']:,} raised an error that names an argument."
        for row in rows
        if "equal" in row.at
    ]
    return "\n".join(
        [
            "# What was broken on purpose",
            "",
            "Tests cause each of these faults on purpose. `make test test-faults FAULTS=docs/results/faults.jsonl` runs them, and "
            f"`python docs/faults.py` writes this page ({'; '.join(versions)}, CPU).",
            '"Lost" counts how often a row, a finished stage or a good checkpoint was lost, an answer was wrong, or damage was not noticed.',
            "[THREATS](../THREATS.md) says what is promised and what is not.",
            "",
            "| fault | tried | lost | test |",
            "|---|---|---|---|",
            *lines,
            "",
            *calls,
            "",
        ]
    )


if __name__ == "__main__":
    (DOCS / "faults.md").write_text(page())
