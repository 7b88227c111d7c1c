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
        f"Of the random calls {row.at['equal']:,} equalled the oracle, {row.at['shape']:,} did in shape and dtype on the meta device, and "
        f"{row.at['refused']:,} were refused by the name of an argument."
        for row in rows
        if "equal" in row.at
    ]
    return "\n".join(
        [
            "# What was broken on purpose",
            "",
            "Made by `make test test-faults FAULTS=docs/results/faults.jsonl` and `python docs/faults.py`; "
            f"{'; '.join(versions)}, CPU.",
            '"Lost" counts the times that a row, a finished stage or a good checkpoint was lost, that a wrong answer was given, or that damage '
            "went unseen.",
            "[THREATS](../THREATS.md) says what is promised and what is not.",
            "",
            "| fault | times | lost | test |",
            "|---|---|---|---|",
            *lines,
            "",
            *calls,
            "",
        ]
    )


if __name__ == "__main__":
    (DOCS / "faults.md").write_text(page())
