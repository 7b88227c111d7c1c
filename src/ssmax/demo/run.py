"""Runs ssmax demo: tables for the terminal, and a page with a slider over the context length."""

import json
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ssmax.demo import measure
from ssmax.demo.measure import MODELS, THETA_FACTOR, Shipped
from ssmax.runs.files import check_destination, write_atomically
from ssmax.runs.progress import progress_bar

TRIALS = 4  # needles for each context size and depth


def demo(out: Path) -> list[str]:
    """Measure the shipped models, write the page, and return the lines for the terminal."""
    check_destination(out, file=True)
    started = time.monotonic()
    shipped = measure.load()
    per_model = shipped.texts.size + TRIALS * len(measure.DEPTHS) * sum(shipped.lengths)
    with progress_bar(2 * per_model, "demo", unit="tokens") as bar:
        facts = facts_of(shipped, bar.update)
    write_atomically(out, page(facts))
    return [*_tables(facts), "", f"Page: {out.resolve()} ({time.monotonic() - started:.0f} s)"]


def page(facts: dict[str, Any]) -> str:
    """Return the page, one HTML file that opens offline; facts are its data, escaped so that no text can end the script."""
    data = json.dumps(facts).replace("<", "\\u003c")
    return files("ssmax.demo").joinpath("page.html").read_text(encoding="utf-8").replace("__FACTS__", data)


def facts_of(shipped: Shipped, progress: Callable[[int], Any], trials: int = TRIALS) -> dict[str, Any]:
    """Return everything that page and tables show; trials is the number of needles for each context size and depth."""
    by_position = measure.losses(shipped, progress)
    outcomes = measure.needles(shipped, trials, progress)
    heads = {name: measure.best_head(found) for name, found in outcomes.items()}

    def share(name: str, n: int) -> float:
        return float(np.mean([trial.correct for trial in outcomes[name][n]]))

    def attention(name: str, n: int) -> float:
        return float(np.mean([trial.scores[heads[name]].item() for trial in outcomes[name][n]]))

    return {
        "lengths": shipped.lengths,
        "losses": by_position,
        "found": [{"n": n, **{name: share(name, n) for name in MODELS}} for n in shipped.lengths],
        "attention": [{"n": n, **{name: attention(name, n) for name in MODELS}} for n in shipped.lengths],
        "views": [_view(shipped, length, heads) for length in shipped.lengths],
        "heads": {name: f"layer {layer}, head {head}" for name, (layer, head) in heads.items()},
        "names": MODELS,
        "rope": {"theta_factor": THETA_FACTOR, "needles": shipped.needle_rope},
        "asked": trials * len(measure.DEPTHS),
        "texts": len(shipped.texts),
        "provenance": shipped.provenance,
    }


def _view(shipped: Shipped, length: int, heads: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Return one context for the page: its tokens, and what each model's best head attends to from the last token."""
    example = shipped.task().example(length, 0.5, np.random.default_rng([length, 1]))

    def seen(name: str) -> dict[str, Any]:
        weights, answer = measure.look(shipped.retrieval[name], example, heads[name], shipped.needle_rope)
        return {
            "weights": [round(weight, 5) for weight in weights],
            "needle": sum(weights[slice(*example.span)]),
            "answer": shipped.tokenizer.decode(answer).strip(),
            "correct": answer == example.answer,
        }

    return {
        "n": len(example.prompt),
        "tokens": [shipped.tokenizer.decode([token]) for token in example.prompt],
        "span": example.span,
        "answer": shipped.tokenizer.decode(example.answer).strip(),
        "models": {name: seen(name) for name in shipped.retrieval},
    }


def _mean_loss(bins: list[dict[str, Any]], first: int, last: int, name: str) -> float:
    """Return the mean loss at positions first to last, which must be whole bins."""
    inside = [row for row in bins if first <= row["first"] and row["last"] <= last]
    return sum(row[name] * (row["last"] - row["first"] + 1) for row in inside) / (last - first + 1)


def _tables(facts: dict[str, Any]) -> list[str]:
    softmax, ssmax = MODELS.values()
    made = facts["provenance"]
    lines = [
        f"Two models of {made['parameters']:,} parameters, trained on windows of {made['train_length']} tokens. Neither was trained on "
        f"longer texts. RoPE: theta × {facts['rope']['theta_factor']} for the loss, Llama 3.1's rule with factor "
        f"{facts['rope']['needles']['factor']:g} for needles.",
        "",
        f"Loss (nats per token) by position, {facts['texts']} held-out texts",
        f"{'positions':>15}  {softmax:>8}  {ssmax:>8}  {'difference':>10}",
    ]
    first = 1
    for last in [n for n in facts["lengths"] if n <= facts["losses"][-1]["last"]]:
        a, b = (_mean_loss(facts["losses"], first, last, name) for name in MODELS)
        lines.append(f"{f'{first:,}-{last:,}':>15}  {a:8.3f}  {b:8.3f}  {b - a:+10.3f}")
        first = last + 1
    lines += ["", f"Needles found of {facts['asked']}", f"{'context':>15}  {softmax:>8}  {ssmax:>8}"]
    lines += [f"{row['n']:>15,}  {row['softmax']:8.0%}  {row['ssmax']:8.0%}" for row in facts["found"]]
    lines += [
        "",
        f"Attention of the best head on the needle, mean of {facts['asked']}",
        f"{'context':>15}  {softmax:>8}  {ssmax:>8}",
    ]
    lines += [f"{row['n']:>15,}  {row['softmax']:8.3f}  {row['ssmax']:8.3f}" for row in facts["attention"]]
    return lines
