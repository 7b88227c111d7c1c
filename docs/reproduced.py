"""Writes the numbers of README.md and REPRODUCING.md from runs: python docs/reproduced.py [RUN ...].

A run's rows become docs/results/NAME.jsonl first, NAME being that of its folder: runs/laptop is laptop. Then the text
between the marks <!-- NAME BLOCK --> and <!-- end --> is written from the rows of each name, nothing else. README's
figure is drawn from the rows of laptop, and the figure of needles is that of its report.
"""

import functools
import itertools
import json
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from matplotlib import rc_context

from ssmax.laws import LAWS
from ssmax.paper.claims import Claim, headlines
from ssmax.paper.figures import claims
from ssmax.paper.formula import formula_rows
from ssmax.paper.measured import FORM_NAMES, NAMES, forms, largest_factor, stretch, variants
from ssmax.paper.recipes import Recipe, tiny
from ssmax.paper.registered import REGISTERED
from ssmax.paper.seeds import FILE, fixed, stored
from ssmax.plots.drawing import STYLE, band, panels, tokens
from ssmax.plots.select import Spread, by, pick
from ssmax.runs.rows import Row, read_rows, write_rows

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
PAGES = [DOCS.parent / "README.md", DOCS.parent / "REPRODUCING.md", DOCS / "laws.md"]
OF_TINY = ("tiny", "held", "fresh")  # runs of the recipe tiny; the first two tell how much its differences vary
NAMED = {claim.name for claim in REGISTERED}
SHOWN = "laptop"  # the run of README's figure and of the figure of needles
FRONT = DOCS / "images" / "front.png"
PICTURE = (
    "![Left: the largest attention weight against the number of keys. Right: loss by position far past the training length]"
    "(docs/images/front.png)"
)
COLOURS = {"a": "#c2410c", "b": "#0369a1"}
BANDS = ((0, 1), (1, 4), (4, 8), (8, 16), (16, 32))  # of positions, in training lengths


def take(run: Path) -> None:
    """Copy the rows of a finished run; rows of the formula alone are left out.

    The rows of a stage share their provenance, which is most of the file: only the first of them keeps it.
    """
    rows = [row for row in read_rows(run / "rows.jsonl") if row.metric not in ("focus_weight", "max_weight")]
    before = [{}, *(row.provenance for row in rows)]
    kept = [replace(row, provenance={}) if row.provenance == p else row for row, p in zip(rows, before, strict=False)]
    write_rows(RESULTS / f"{run.name}.jsonl", kept)
    if run.name == SHOWN:
        shutil.copy(run / "figures" / "figure6.png", DOCS / "images" / "needles.png")


@functools.cache
def results(name: str) -> list[Row]:
    """Return the rows of a run that was taken. A row without provenance has that of the row before it."""
    rows: list[Row] = []
    for row in read_rows(RESULTS / f"{name}.jsonl"):
        rows.append(row if row.provenance else replace(row, provenance=rows[-1].provenance))
    return rows


def draw_front(rows: list[Row], length: int) -> None:
    """Draw README's figure: what fades, and what that costs, in one picture."""
    factor = largest_factor(rows, "loss_by_position")
    with rc_context({**STYLE, "font.size": 11, "axes.titlesize": 12}):
        figure, axes = panels(1, 2, 10, 3.6)
        left, right = axes[0]
        for variant, colour in COLOURS.items():
            weights = by(pick(formula_rows(), "max_weight", variant), "n")
            left.plot(list(weights), [w[0] for w in weights.values()], color=colour, lw=2.5)
            left.annotate(NAMES[variant], (list(weights)[-1], list(weights.values())[-1][0]), color=colour, **LABEL)
            losses = by(pick(rows, "loss_by_position", variant, form="paper", theta_factor=factor), "position")
            kept = {position: values for position, values in losses.items() if position >= length / 8}
            middle = [np.mean(values) for values in kept.values()]
            ends = [min(v) for v in kept.values()], [max(v) for v in kept.values()]
            band(right, list(kept), middle, ends, colour, NAMES[variant], lw=2.5)
            right.annotate(NAMES[variant], (list(kept)[-1], middle[-1]), color=colour, **LABEL)
        right.axvline(length, color="#64748b", ls=":")
        right.annotate("training length", (length, right.get_ylim()[1]), color="#64748b", va="top", fontsize=9)
        tokens(left, [2, 32, 1024, 32768], "number of keys")
        tokens(right, [length // 4, length, length * 4, length * 16], "position (tokens)")
        left.set_title("Largest attention weight")
        right.set_title("Loss (nats a token), mean and range over seeds")
        figure.savefig(FRONT, dpi=130)


LABEL = {
    "xytext": (4, 0),
    "textcoords": "offset points",
    "va": "center",
    "fontweight": "bold",
    "annotation_clip": False,
}


def interval(claim: Claim) -> str:
    if not claim.paired.seeds:
        return ""
    low, high = claim.paired.interval
    return f"{claim.paired.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def abstract(found: list[Claim], link: str) -> str:
    lines = [
        f"| what the abstract claims | measured here | difference (95 % interval) | {link} | verdict |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {line.title} | {line.words} | {interval(line.claim)} | {line.claim.figure} | **{line.claim.verdict}** |"
        for line in headlines(found)
    ]
    return "\n".join(lines)


def all_claims(found: list[Claim]) -> str:
    lines = ["| figure | claim | measured | verdict |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {c.figure} | {c.claim} | {c.measured} | {c.verdict} |" for c in found)])


def losses(rows: list[Row], length: int) -> str:
    factor = largest_factor(rows, "loss_by_position")
    names = [f"{first * length + 1:,}-{last * length:,}" for first, last in BANDS]
    lines = [f"| loss at positions, theta × {factor} | {' | '.join(names)} |", "|---" * (len(BANDS) + 1) + "|"]
    for form in forms(pick(rows, "loss_by_position")):
        for variant in variants(pick(rows, "loss_by_position", form=form)):
            kept = pick(rows, "loss_by_position", variant, form=form, theta_factor=factor)
            cells = []
            for first, last in BANDS:
                per_seed = defaultdict(list)
                for row in kept:
                    if first * length < row.at["from"] and row.at["position"] <= last * length:
                        width = row.at["position"] - row.at["from"] + 1
                        per_seed[row.seed].append((row.value * width, width))
                sums = [np.sum(pairs, 0) for pairs in per_seed.values()]
                cells.append(f"{Spread(tuple(total / width for total, width in sums)):.3f}")
            lines.append(f"| ({variant}) {NAMES[variant]}, {FORM_NAMES[form]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(per_seed: dict) -> Spread:
    """Return the spread of the seeds' means."""
    return Spread(tuple(float(np.mean(values)) for values in per_seed.values()))


def needles(rows: list[Row], length: int) -> str:
    cells, judged = pick(rows, "retrieval_accuracy"), largest_factor(rows, "retrieval_accuracy")
    sizes = sorted({row.at["length"] for row in cells})
    factors = sorted({row.at["theta_factor"] for row in cells} - {1}, key=lambda factor: (factor != judged, factor))
    heads = [f"{length}, RoPE as trained", *(f"{size:,}" for size in sizes)]
    lines = [f"| needles found | RoPE | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for factor, form in itertools.product(factors, forms(cells)):
        for variant in variants(pick(cells, "retrieval_accuracy", form=form)):
            places = [(1, length), *((factor, size) for size in sizes)]
            shares = [
                by(pick(cells, "retrieval_accuracy", variant, form=form, theta_factor=f, length=size), "seed")
                for f, size in places
            ]
            rope = stretch(pick(cells, "retrieval_accuracy", theta_factor=factor)[0])
            found = " | ".join(f"{spread(x):.2f}" for x in shares)
            lines.append(f"| ({variant}) {NAMES[variant]}, {FORM_NAMES[form]} | {rope} | {found} |")
    return "\n".join(lines)


STAGES = {"train_loss": "pretrain", "text_loss": "position_loss", "top_needle_score": "retrieval"}


def costs(rows: list[Row]) -> str:
    """Seconds of each stage, from the provenance that its rows share."""
    taken: dict[str, dict] = defaultdict(dict)
    for row in rows:
        stage = row.at.get("stage") or STAGES.get(row.metric)
        if stage and "seconds" in row.provenance:
            taken[stage][row.variant, row.seed, row.at["form"]] = row.provenance
    lines = ["| stage | models | processor seconds a model | all | peak memory |", "|---|---|---|---|---|"]
    for stage, models in taken.items():
        seconds = [p["processor_seconds"] for p in models.values()]
        peak = max(p["peak_mib"] for p in models.values())
        lines.append(
            f"| {stage} | {len(models)} | {np.mean(seconds):.0f} | {sum(seconds) / 60:.1f} minutes | {peak:,} MiB |"
        )
    return "\n".join(lines)


def made(rows: list[Row], name: str) -> str:
    """Where the rows come from."""
    p, seeds = rows[-1].provenance, sorted({row.seed for row in rows if row.seed is not None})
    return (
        f"Seeds {', '.join(map(str, seeds))}; ± is the standard deviation over seeds. Python {p['python']}, torch {p['torch']}, "
        f"transformers {p['transformers']}, commit {p['commit']}; the rows are in docs/results/{name}.jsonl, corpus {p['corpus'].split()[-1]}."
    )


def formulas() -> str:
    """Every law of ssmax.laws."""
    lines = ["| law | m | source | learned | parameters |", "|---|---|---|---|---|"]
    for name, law in LAWS.items():
        learned = (
            LEARNED_ELSEWHERE.get(name) or ", ".join(law.learned) + " for each head" * bool(law.learned) or "nothing"
        )
        given = ", ".join(key if value is None else f"{key} = {value:,}" for key, value in law.defaults.items())
        lines.append(f"| `{name}` | {law.formula} | {law.source} | {learned} | {given} |")
    return "\n".join(lines)


LEARNED_ELSEWHERE = {
    "ssmax": "s, and b with `bias=True`, for each head",
    "mistral-large-4": 'as `"identity"`: s and b for each head',
    "olmo": "as `init=1.0`: s for each head",
    "query-aware": "two networks a layer: (k + 1) D H + (2 D + 3) k + D numbers for k hidden units and H heads of D",
}


def prices(rows: list[Row], length: int) -> str:
    """What each law learns and costs."""
    lines = [
        "| law | learned numbers | processor seconds of pretraining | where they end, mean over heads |",
        "|---|---|---|---|",
    ]
    for variant in variants(pick(rows, "loss_by_position")):
        trained = {row.seed: row.provenance for row in pick(rows, "train_loss", variant)}
        seconds = [p["processor_seconds"] for p in trained.values()]
        count = max((row.value for row in pick(rows, "scale_parameters", variant)), default=0)
        names = dict.fromkeys(row.at["name"] for row in pick(rows, "learned_scale", variant))
        ends = ", ".join(f"{n} {spread(by(pick(rows, 'learned_scale', variant, name=n), 'seed')):.3f}" for n in names)
        time = f"{np.mean(seconds):.0f}" if seconds else "none: the trained Softmax model"
        lines.append(f"| ({variant}) {NAMES[variant]} | {count:,.0f} | {time} | {ends} |")
    return "\n".join(lines)


MARK = re.compile(r"(<!-- ([\w-]+) (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


@functools.cache
def judged(name: str, length: int, with_formula: bool) -> list[Claim]:
    known = stored(as_json(tiny()), None) if name in OF_TINY else {}
    return claims([*(formula_rows() if with_formula else []), *results(name)], length, known)


def seeds() -> str:
    """Return what the differences of tiny's claims are for each seed, from the rows, for the file that reports read."""
    differences: dict = defaultdict(lambda: defaultdict(dict))
    for rows in map(results, OF_TINY[:2]):
        run = sorted({row.seed for row in rows if row.seed is not None})
        for claim in claims(rows, tiny().train_length):
            if claim.name in NAMED and claim.paired.seeds == len(run):
                values = (round(value, 6) for value in claim.paired.values)
                differences[claim.form][claim.name] |= dict(zip(map(str, run), values, strict=True))
    return json.dumps({"recipe": fixed(as_json(tiny())), "differences": differences}, indent=1) + "\n"


def as_json(recipe: Recipe) -> dict:
    """Return a recipe's fields as recipe.json holds them."""
    return json.loads(json.dumps(asdict(recipe)))


def block(name: str, kind: str, length: int) -> str:
    """What a page shows of a run."""
    if kind == "formulas":
        return formulas()
    if not (RESULTS / f"{name}.jsonl").exists():
        return (
            f"**Not run yet.** Run it into `runs/{name}`, then `python docs/reproduced.py runs/{name}`."
            if kind == "made"
            else ""
        )
    rows = results(name)
    if kind in ("abstract", "claims", "trained", "verdicts"):
        found = judged(name, length, kind != "trained")
        if kind == "trained":
            return all_claims(found)
        if kind == "verdicts":
            return all_claims([claim for claim in found if claim.figure == name])
        return abstract(found, "figure") if kind == "abstract" else all_claims(found)
    if kind == "figure":
        return PICTURE
    if kind == "made":
        return made(rows, name)
    return (
        costs(rows) if kind == "costs" else {"losses": losses, "needles": needles, "prices": prices}[kind](rows, length)
    )


def page(text: str) -> str:
    """Return the text of a page with what its marks ask for."""
    length = tiny().train_length
    return MARK.sub(lambda match: match[1] + block(match[2], match[3], length) + match[4], text)


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        take(Path(folder))
    FILE.write_text(seeds())
    draw_front(results(SHOWN), tiny().train_length)
    for path in PAGES:
        path.write_text(page(path.read_text()))
