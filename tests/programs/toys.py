"""Adds a toy of each kind from the one place that ARCHITECTURE.md names, and runs it: toys.py FOLDER."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from ssmax import functional, laws
from ssmax.compare import tasks
from ssmax.paper import models, stages
from ssmax.runs.rows import Row, read_rows, write_rows

FIGURE = """
from matplotlib.figure import Figure as Drawing
from ssmax.paper.figure import Figure
from ssmax.paper.registered import Registered

FIGURE = Figure(
    "toy", "toy", "A toy's caption.", lambda rows, train_length: Drawing(),
    claims=(Registered("toy", "toy", "A toy is lower", "it is", "trained", "lower", ("z", "a")),),
)
"""


def twice(n):
    return torch.full_like(n, 2.0)


# The entries come first, since options and reports are made from them.
laws.LAWS["toy"] = laws.Law("2", "n", "a test", twice)
functional.BACKENDS["toy"] = SimpleNamespace(
    why_not=lambda call: "is for toys, not for windows" if call.window else None,
    forward=lambda call: call.multiplier[..., None] * call.value,
)
models.VARIANTS["z"] = models.Variant("z", "toy", "a toy", "#000000", {"law": "toy"})
stages.STAGES["toy"] = stages.Stage(
    "toy",
    asked=lambda recipe, job: job.variant == "z",
    tokens=lambda recipe: 7,
    run=lambda job, *rest: [Row("toy", job.variant, job.seed, {"form": job.form}, 1.0, 1)],
)


class Copy:
    """Prompts that end with the number that they begin with."""

    def __init__(self, encode):
        self.encode = encode

    def grid(self, cells, rng):
        from ssmax.evaluation import NeedleExample

        digit = self.encode(str(rng.integers(10)))
        return {(n, d): NeedleExample(digit + self.encode("x" * (n - 2)), digit, (0, 1)) for n, d in cells}


tasks.TASKS["toy"] = tasks.Task("toys", "a toy", lambda material, form: Copy(material.encode))

import pytest  # noqa: E402
from plain_bytes import byte_tokenizer  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

import ssmax  # noqa: E402
from ssmax import cli  # noqa: E402
from ssmax.cli import COMMANDS  # noqa: E402
from ssmax.hf import visibility  # noqa: E402
from ssmax.paper import figures, report  # noqa: E402
from ssmax.paper.building import build_model  # noqa: E402
from ssmax.paper.recipes import smoke  # noqa: E402
from ssmax.runs.folder import RunFolder  # noqa: E402

TOKENS = torch.arange(12)[None]
SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}


WITHOUT_SSMAX = """
import sys
sys.modules["ssmax"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.arange(12)[None]).logits, sys.argv[2])
"""


def law(folder):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=2)).eval()
    plain = model(TOKENS).logits
    model.model.layers[0].self_attn.q_proj.weight.data *= 2
    want = model(TOKENS).logits
    model.model.layers[0].self_attn.q_proj.weight.data /= 2
    ssmax.convert(model, law="toy").save_pretrained(folder / "law")
    program = [sys.executable, "-W", "ignore", "-c", WITHOUT_SSMAX, folder / "law", folder / "logits.pt"]
    subprocess.run(program, check=True, env={**os.environ, "HF_HOME": str(folder / "home")})
    for got in (model(TOKENS).logits, torch.load(folder / "logits.pt")):
        torch.testing.assert_close(got, want)
    assert not torch.allclose(want, plain)


def kernel():
    x = torch.ones(1, 2, 5, 4)
    got = ssmax.attention(x, x, x, 0.5, is_causal=True, impl="toy")
    torch.testing.assert_close(got[0, 1, :, 0], 0.5 * torch.arange(1, 6).log())
    with pytest.raises(ValueError, match="impl='toy' is for toys"):
        ssmax.attention(x, x, x, 0.5, is_causal=True, window=2, impl="toy")


def toy_mask(*args, **kwargs):
    """Another meaning of masks than those that are known: True is hidden."""
    mask = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    return None if mask is None else ~mask


def toy_attention(module, query, key, value, mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, ~mask, **kwargs)


def attention_implementation():
    AttentionInterface.register("toy", toy_attention)
    AttentionMaskInterface.register("toy", toy_mask)
    model = ssmax.convert(LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=2)).eval(), train_length=12)
    inputs = {"input_ids": TOKENS.expand(2, -1), "attention_mask": torch.ones(2, 12).tril(8)}
    want = model(**inputs).logits
    model.set_attn_implementation("toy")
    with pytest.raises(ValueError, match="does not know what the masks of attention implementation 'toy' mean"):
        model(**inputs)
    visibility.RULES[toy_mask] = lambda module, query, key, mask, kwargs: ssmax.visible_keys(mask=~mask)
    torch.testing.assert_close(model(**inputs).logits, want)


def task(folder):
    model = LlamaForCausalLM(
        LlamaConfig(**SHAPE | {"vocab_size": 300}, num_attention_heads=2, max_position_embeddings=64)
    )
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("Some text of several words. " * 40)
    options = [
        "--measures",
        "retrieval",
        "--tasks",
        "toy",
        "--length",
        "32",
        "--sizes",
        "16",
        "32",
        "--depths",
        "0",
        "--trials",
        "2",
    ]
    arguments = [
        "evaluate",
        str(folder / "model"),
        "--texts",
        str(folder / "text.txt"),
        "--out",
        str(folder / "measured"),
    ]
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, *options])
    assert end.value.code == 0
    rows = [row for row in read_rows(folder / "measured" / "rows.jsonl") if row.metric == "retrieval_accuracy"]
    assert [(row.at["task"], row.at["length"], row.samples) for row in rows] == [("toy", 16, 2), ("toy", 32, 2)]
    assert "Retrieval, toys" in (folder / "measured" / "report.html").read_text()


def variant_stage_and_figure(folder):
    recipe = dataclasses.replace(smoke(), models=("paper:az",), retrieval=(), counting=())
    job = recipe.jobs[1]
    assert (job.variant, recipe.stages(job)) == ("z", ["pretrain", "position_loss", "toy"])
    model = build_model(recipe, job.form, job.variant, job.seed, vocab_size=300)
    assert model.config.ssmax["law"] == "toy"
    run = RunFolder(folder / "run", recipe, None)
    with run.opened():
        run.claim("none")
        rows = [Row("train_loss", x, 0, {"form": "paper", "stage": "pretrain", "step": 30}, ord(x), 1) for x in "az"]
        for name in run.todo(job):
            found = stages.STAGES[name].run(job, recipe) if name == "toy" else rows
            write_rows(run.stage_file(f"{job.name}.{name}"), found, checked=True)
        assert run.todo(job) == []
        write_rows(run.rows_file, [*read_rows(run.stage_file(f"{job.name}.toy")), *rows])
    (folder / "toy_figure.py").write_text(FIGURE)
    figures.__path__.append(str(folder))
    figures.FIGURES.update(figures.find_figures())
    [claim] = [claim for claim in report.build(run.folder) if claim.name == "toy"]
    page = (run.folder / "report.html").read_text()
    assert "A toy's caption." in page.replace("&#x27;", "'")
    assert "toy" in claim.measured
    assert (run.folder / "figures" / "toy.svg").exists()
    assert json.loads((run.folder / "recipe.json").read_text())["recipe"]["models"] == ["paper:az"]


@dataclasses.dataclass(frozen=True)
class Toy:
    """A toy."""

    word: str = "none"

    def run(self):
        print(f"toy says {self.word}")


def command():
    COMMANDS["toy"] = Toy
    cli.main(["toy", "--word", "hello"])  # which exits


if __name__ == "__main__":
    law(Path(sys.argv[1]))
    kernel()
    attention_implementation()
    variant_stage_and_figure(Path(sys.argv[1]))
    task(Path(sys.argv[1]))
    command()
