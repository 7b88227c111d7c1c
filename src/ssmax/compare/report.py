"""The report of ssmax evaluate, made from rows alone: tables, figures and one page that show models side by side."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssmax.compare.tasks import TASKS
from ssmax.plots.html import document, escaped, figures_html, is_made_from, state_of
from ssmax.plots.select import by, pick
from ssmax.runs.files import write_atomically
from ssmax.runs.rows import Row, read_rows


@dataclass(frozen=True)
class Table:
    """A table with a line for each model and a column for each coordinate.

    Attributes:
        title: the caption.
        columns: names of the coordinates.
        lines: for each model its name and its numbers; None where nothing was measured.
        spec: format of a number.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[float | None, ...]], ...]
    spec: str


def build(folder: Path) -> list[Table]:
    """Write figures and report.html of a finished evaluation, from its rows.jsonl and recipe.json; return the tables.

    A report that was made from the same rows by the same code is left as it is.
    """
    rows = read_rows(folder / "rows.jsonl")
    found, page, state = tables(rows), folder / "report.html", state_of(folder)
    if is_made_from(page, state):
        return found
    from ssmax.compare.figures import FIGURES  # loads matplotlib
    from ssmax.plots.drawing import save

    models, images = models_of(rows), []
    for name, (metric, caption, draw) in FIGURES.items():
        if pick(rows, metric):
            images.append((caption, save(partial(draw, rows, models), folder / "figures", name)))
    write_atomically(page, _page(rows, json.loads((folder / "recipe.json").read_text()), found, images, state))
    return found


def models_of(rows: Sequence[Row]) -> list[str]:
    """Return the models in the order in which the user gave them; this is also the order of their colours."""
    return list(dict.fromkeys(row.variant for row in rows))


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return all tables for which there are rows."""
    models = models_of(rows)
    found = [_loss(rows, models)] if pick(rows, "loss_by_position") else []
    for task in dict.fromkeys(row.at["task"] for row in pick(rows, "retrieval_accuracy")):
        for metric, words in (
            ("retrieval_accuracy", "whole number right"),
            ("first_digit_accuracy", "first digit right"),
        ):
            cells = pick(rows, metric, task=task)
            name = f"Retrieval, {TASKS[task].title}: {words}, by context size (mean over depths)"
            found.append(_table(name, models, cells, "length", ".2f", np.mean))
    if scores := pick(rows, "needle_score"):
        name = "Attention on the needle from the query that answers: best head, mean over trials"
        found.append(_table(name, models, scores, "task", ".3f", max))
    for metric, sink, words in (
        ("attention_entropy", "with", "Entropy of attention / log n, mean over heads, by tokens n"),
        ("largest_weight", "with", "Largest attention weight, mean over heads, by tokens n"),
        ("largest_weight", "without", "Largest attention weight without the first token, mean over heads, by tokens n"),
    ):
        if cells := pick(rows, metric, sink=sink, heads="mean"):
            found.append(_table(words, models, cells, "n", ".3f", np.mean))
    return found


def _table(name: str, models, rows: Sequence[Row], coordinate: str, spec: str, reduce: Callable) -> Table:
    values = by(rows, "variant", coordinate)
    columns = list(dict.fromkeys(row.at[coordinate] for row in rows))
    lines = tuple(
        (model, tuple(float(reduce(values[model, c])) if (model, c) in values else None for c in columns))
        for model in models
    )
    return Table(name, tuple(f"{c:,}" if isinstance(c, int) else str(c) for c in columns), lines, spec)


def _loss(rows, models):
    """Return the table of losses by octave of position; a row's bin is half an octave."""
    losses = pick(rows, "loss_by_position")
    longest = max(row.at["position"] for row in losses)
    edges = [0, *sorted({2**k for k in range(8, 40) if 2**k < longest} | {longest})]

    def mean(model, first, last):
        inside = [row for row in losses if row.variant == model and first < row.at["position"] <= last]
        return float(np.average([r.value for r in inside], weights=[r.samples for r in inside])) if inside else None

    spans = list(itertools.pairwise(edges))
    lines = tuple((model, tuple(mean(model, *span) for span in spans)) for model in models)
    documents = losses[0].samples // (losses[0].at["position"] - losses[0].at["from"] + 1)
    name = f"Loss by position, nats per token, {documents} document{'s' * (documents > 1)}, positions to"
    return Table(name, tuple(f"{last:,}" for _, last in spans), lines, ".3f")


def tables_text(found: Sequence[Table]) -> str:
    """Return the tables for a terminal."""
    parts = []
    for table in found:
        left = max(len(model) for model, _ in table.lines)
        width = max(7, *(len(column) for column in table.columns))
        lines = [table.title, " " * left + "".join(f"  {column:>{width}}" for column in table.columns)]
        lines += [
            f"{model:<{left}}" + "".join(f"  {_cell(v, table):>{width}}" for v in line) for model, line in table.lines
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def tables_json(found: Sequence[Table]) -> str:
    """Return the tables as JSON: a list of title, model, at and value."""
    return json.dumps(
        [
            {"table": table.title, "model": model, "at": column, "value": value}
            for table in found
            for model, line in table.lines
            for column, value in zip(table.columns, line, strict=True)
        ],
        indent=1,
    )


def _cell(value, table):
    return "" if value is None else format(value, table.spec)


def _page(rows, kept, found, images, state):
    settings: dict[str, Any] = kept["recipe"]
    facts = ", ".join(f"{name} {value}" for name, value in rows[-1].provenance.items() if value is not None)
    html_tables = "".join(
        f"<h3>{escaped(table.title)}</h3><table><tr><th>model</th>{''.join(f'<th>{escaped(c)}</th>' for c in table.columns)}</tr>"
        + "".join(
            f"<tr><td>{escaped(model)}</td>{''.join(f'<td>{_cell(value, table)}</td>' for value in line)}</tr>"
            for model, line in table.lines
        )
        + "</table>"
        for table in found
    )
    body = f"""<h1>Long context, side by side</h1>
<p class="sub">{escaped(", ".join(models_of(rows)))}. {len(rows):,} measured rows in rows.jsonl.</p>
<h2>Tables</h2>{html_tables}
<h2>Figures</h2>{figures_html(images)}
<h2>How it was measured</h2><ul>{"".join(f"<li>{escaped(line)}</li>" for line in _method(settings))}</ul>
<p>{escaped(facts)}</p>
<details><summary>All settings</summary><pre>{escaped(json.dumps(kept, indent=1))}</pre></details>"""
    return document("evaluate", state, body)


def _method(s):
    rope = f"RoPE theta × {s['theta_factor']:g}" + (f", scaled by {s['rope']}" if s["rope"] else "")
    lines = [
        f"{rope}, for all models.",
        f"Loss and attention: up to {s['documents']} documents of {s['length']:,} tokens each. Bands are 95 % confidence intervals of the "
        "mean over documents (Student's t). Losses of models with different tokenizers cannot be compared, since their tokens differ.",
        "Entropy is divided by the log of the number of keys: 1 is uniform attention. The first token often takes attention that no other "
        "key needs (a sink); “without the first token” leaves it out and renormalises the other weights.",
        f"Retrieval: {s['trials']} trials for each context size and depth, the same for models of one tokenizer; greedy decoding; the "
        f"prompt is for {'chat' if s['prompt'] == 'chat' else 'base'} models. One needle: “The special magic Tokyo number is: 8106422.” in the text. "
        f"Distractors: {s['distractors']} needles for other cities. Letters with digits: lines such as “A=482910”; the line that is asked "
        "for occurs once.",
        "Needle score: the attention of one head on the needle's tokens, from the query that predicts the first token of the answer.",
    ]
    if s["finetune_steps"]:
        lines.append(
            f"Fine-tuned before retrieval for {s['finetune_steps']:,} steps of {s['finetune_batch_size']} examples of up to "
            f"{s['finetune_length']:,} tokens, loss on the answer (the paper's Table 3)."
        )
    return lines
