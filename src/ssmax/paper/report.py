"""report.html: verdicts, figures and settings on one page that opens offline; and the table of verdicts for the terminal."""

import json
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ssmax.paper.claims import HOLDS, HOLDS_NOT, RULE, Claim, headlines, interval_words
from ssmax.paper.measured import FORM_NAMES
from ssmax.paper.recipes import PAPER_THETA, fitting_theta, turns
from ssmax.paper.seeds import stored
from ssmax.plots.html import document, escaped, figures_html, is_made_from, state_of
from ssmax.runs.files import write_atomically
from ssmax.runs.rows import read_rows

CSS = {HOLDS: "holds", HOLDS_NOT: "not"}


def build(folder: Path) -> list[Claim]:
    """Write the figures and report.html of a finished run, from its rows.jsonl and recipe.json; return the verdicts.

    A report that was made from the same rows by the same code is left as it is.
    """
    from ssmax.paper.figures import FIGURES, claims, drawable  # loads matplotlib
    from ssmax.plots.drawing import save

    rows = read_rows(folder / "rows.jsonl")
    settings = json.loads((folder / "recipe.json").read_text())
    recipe = settings["recipe"]
    found = claims(rows, recipe["train_length"], stored(recipe, settings["corpus"]))
    page = folder / "report.html"
    made_from = state_of(folder)
    if is_made_from(page, made_from):
        return found
    images = []
    for name in drawable(rows):
        figure = FIGURES[name]
        drawn = partial(figure.draw, rows, recipe["train_length"])
        image = save(drawn, folder / "figures", figure.file_name)
        images.append((figure.caption, image))
    write_atomically(page, _page(rows, settings, found, images, made_from))
    return found


def claims_text(found: Sequence[Claim], width: int) -> str:
    """Return the verdicts as a table for a terminal with `width` columns, at least 40."""
    verdict, width = 14, max(width, 40)
    claim = (width - verdict - 4) * 2 // 5
    columns = [claim, width - verdict - 4 - claim, verdict]
    lines = [_line(("what the abstract claims", "measured here", "verdict"), columns), "─" * (sum(columns) + 4)]
    for line in headlines(found):
        lines += [_line((line.title, f"{line.words} {_evidence(line.claim)}", line.claim.verdict), columns), ""]
    lines += [_line(("claim", "measured here", "verdict"), columns), "─" * (sum(columns) + 4)]
    for claim in found:
        cells = (f"{_label(claim)}: {claim.claim}", claim.measured, claim.verdict)
        lines += [_line(cells, columns), ""]
    return "\n".join(lines)


def _evidence(claim):
    interval = f"{interval_words(claim.paired).capitalize()}. " if claim.paired.seeds else ""
    return f"{interval}Figure {claim.figure}, {FORM_NAMES[claim.form]}."


def _abstract(found):
    """Return the abstract's claims as HTML, one row each: in plain words, with numbers, interval, figure and verdict."""
    rows = "".join(
        f"<tr><td><strong>{escaped(line.title)}</strong></td><td>{escaped(line.words)}<br><small>{escaped(_evidence(line.claim))}</small></td>"
        f"<td class='{CSS.get(line.claim.verdict, 'open')}'>{escaped(line.claim.verdict)}</td></tr>"
        for line in headlines(found)
    )
    if not rows:
        return ""
    return f"""<h2>What the abstract claims</h2>
<table><tr><th>Claim</th><th>Measured here</th><th>Verdict</th></tr>{rows}</table>
<p>The loss measures how badly a model predicts the next token, in nats; lower is better. A difference is the first model's value minus
the second's. Of 100 such intervals about 95 contain the true mean difference over seeds. A claim holds if its whole interval lies on
the claimed side of zero, and is open if the interval contains zero.</p>"""


def _label(claim):
    return f"Fig. {claim.figure}" if isinstance(claim.figure, int) else claim.figure.capitalize()


def _line(cells, columns):
    wrapped = [textwrap.wrap(cell, column) for cell, column in zip(cells, columns, strict=True)]
    height = max(map(len, wrapped))
    padded = [cell + [""] * (height - len(cell)) for cell in wrapped]
    return "\n".join(
        "  ".join(part.ljust(column) for part, column in zip(parts, columns, strict=True)).rstrip()
        for parts in zip(*padded, strict=True)
    )


def _page(rows, settings, found, images, made_from):
    recipe, provenance = settings["recipe"], rows[-1].provenance
    table = "".join(
        f"<tr><td>{_label(claim)}</td><td>{escaped(claim.claim)}</td><td>{escaped(claim.paper)}</td>"
        f"<td>{escaped(claim.measured)}</td><td class='{CSS.get(claim.verdict, 'open')}'>{escaped(claim.verdict)}</td></tr>"
        for claim in found
    )
    figures = figures_html(images)
    facts = ", ".join(f"{name} {value}" for name, value in provenance.items() if value is not None)
    body = f"""<h1>Softmax against Scalable-Softmax</h1>
<p class="sub">Recipe “{escaped(recipe["name"])}”: experiments of arXiv 2501.19399, run on this machine. {len(rows):,} measured rows are in rows.jsonl.</p>
{_abstract(found)}
<h2>All claims of the paper's figures</h2>
<table><tr><th>Figure</th><th>Claim</th><th>The paper's finding</th><th>Measured here</th><th>Verdict</th></tr>{table}</table>
<p>{escaped(RULE)} Spreads are standard deviations over seeds.</p>
<h2>Figures</h2>{figures}
<h2>How it was measured</h2>
<ul>{"".join(f"<li>{escaped(line)}</li>" for line in _method(rows, recipe))}</ul>
{_tables(recipe)}
<p>{escaped(facts)}</p>
<details><summary>All settings</summary><pre>{escaped(json.dumps(settings, indent=1))}</pre></details>"""
    return document(recipe["name"], made_from, body)


def _tables(recipe):
    """Return the paper's Tables 1 to 3 as HTML, with this run's values beside the paper's."""
    r = recipe
    vocabulary = (
        f"{r['vocab_size']:,}, trained on the text, and the needle's words" if not r["tokenizer"] else r["tokenizer"]
    )
    tables = {
        "Table 1. Model": [
            ("layers", "12", r["num_layers"]),
            ("heads", "12", r["num_heads"]),
            ("hidden size", "768", r["hidden_size"]),
            ("feed-forward, gated", "2,048", r["intermediate_size"]),
            ("vocabulary", "50,257", vocabulary),
            ("position encoding", "RoPE, theta 10,000", f"RoPE, theta {theta_of(r):,.0f}"),
            ("dropout", "none", "none"),
        ],
        "Table 2. Pretraining": [
            ("optimizer", "AdamW (0.9, 0.95), gradients clipped to 1.0", "the same"),
            ("weight decay", "0.1, on parameters of rank ≥ 2", f"{r['weight_decay']:g}, on the same"),
            (
                "learning rate",
                "6e-4, constant after 1,000 steps",
                f"{r['learning_rate']:g}, constant after {r['warmup_steps']:,} steps",
            ),
            ("sequence", "1,024 tokens", f"{r['train_length']:,} tokens"),
            ("batch", "2,048 sequences", f"{r['batch_size']:,} sequences"),
            ("precision", "bfloat16", r["precision"]),
            ("steps", "not known here", f"{r['steps']:,}"),
        ],
        "Table 3. Fine-tuning for retrieval": [
            ("optimizer", "AdamW (0.9, 0.999), no decay, gradients clipped to 1.0", "the same"),
            (
                "learning rate",
                "2e-5, cosine, one epoch of warm-up",
                f"{r['finetune_learning_rate']:g}, cosine, {r['finetune_warmup_steps']:,} steps of warm-up",
            ),
            ("sequence", "1,024 tokens", f"up to {r['train_length']:,} tokens"),
            ("batch", "128 sequences", f"{r['finetune_batch_size']:,} sequences, {r['finetune_steps']:,} steps"),
        ],
    }
    return "".join(
        f"<h3>{name}</h3><table><tr><th></th><th>The paper</th><th>Here</th></tr>"
        + "".join(f"<tr><td>{escaped(a)}</td><td>{escaped(b)}</td><td>{escaped(c)}</td></tr>" for a, b, c in lines)
        + "</table>"
        for name, lines in tables.items()
    )


def theta_of(recipe: dict) -> float:
    """Return RoPE's theta in training for a recipe from recipe.json. Without the field theta it is the paper's 10,000."""
    if "theta" not in recipe:
        return PAPER_THETA
    return recipe["theta"] or fitting_theta(recipe["train_length"], recipe["full_turns"])


def _needle_rope_words(recipe):
    if recipe.get("needle_rope") != "llama3":
        return ""
    factor = max(recipe["needle_theta_factors"] or recipe["theta_factors"])
    return (
        f" Past the training length RoPE is stretched by Llama 3.1's rule: slow frequencies are divided by {factor}, fast ones "
        "kept. The paper multiplies theta by 50."
    )


def _method(rows, recipe):
    digits, length = recipe["needle_digits"], recipe["train_length"]
    texts, theta = recipe["loss_texts"], theta_of(recipe)
    turning = turns(theta, length)
    return [
        f"Models: {recipe['num_layers']} layers, {recipe['num_heads']} heads, hidden {recipe['hidden_size']}, RMSNorm, gated "
        f"feed-forward. RoPE's theta is {theta:,.0f}, so that {turning:.0%} of its frequencies complete a turn in training (the "
        f"paper, with theta 10,000: 55 %). Trained on windows of {length} tokens, {recipe['steps']} steps of "
        f"{recipe['batch_size']} windows. The paper: 12 layers, hidden 768, windows of 1,024, batches of 2,048.",
        "Forms: “paper's form” is the paper's Llama shape. “with QK-norm” normalises queries and keys, which limits the logits, so that "
        "the factor log n has an effect without long training. “with partial RoPE” applies RoPE to half of each head.",
        "Models: SSMax starts at s = 1 / mean log n over the training length. “without s” has the factor log n. “with b” learns "
        "s log n + b from b = 0. “switched afterwards” is the trained Softmax model, converted with that s and not trained further. "
        "“switched late” is Softmax for seven eighths of the steps and SSMax for the rest, in one training.",
        f"Loss by position: up to {texts} held-out texts of {length * recipe['length_factor']:,} tokens. No model is trained on "
        "more than the training length.",
        f"Retrieval: “The special magic Tokyo number is: {'8106422'[:digits]}.” with a number of {digits} digit{'s' * (digits > 1)} (the paper: 7), "
        "hidden in held-out text. The tokenizer keeps each word of the sentence whole. Fine-tuned with the loss on the answer, on "
        f"contexts that grow up to the training length. An answer is right if greedy decoding gives exactly the number; "
        f"{recipe['trials']} trials for each cell and seed, the same for all models.{_needle_rope_words(recipe)}",
        "Needle score: the paper does not define it precisely. Here it is the attention of one head on the needle's tokens, from the "
        "query that predicts the first token of the answer.",
    ]
