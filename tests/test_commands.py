"""ssmax convert and inspect on real folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import ssmax
import ssmax.hf

SSMAX = str(Path(sys.executable).with_name("ssmax"))
TOKENS = torch.arange(3, 13)[None]


def run(*arguments):
    return subprocess.run([SSMAX, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    return tmp_path


def test_convert_and_inspect(folder):
    done = run("convert", folder / "plain", folder / "new", "--init", "0.5", "--layers", "1")
    assert done.returncode == 0, done.stderr
    assert "0.5000 0.5000 0.5000 0.5000" in done.stdout
    assert (folder / "new" / "tokenizer.json").exists()
    want = ssmax.convert(AutoModelForCausalLM.from_pretrained(folder / "plain"), 0.5, layers=[1])(TOKENS).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder / "new")(TOKENS).logits, want)
    told = run("inspect", folder / "new")
    assert told.returncode == 0
    assert "law s log n, init 0.5" in told.stdout
    assert "softmax" in told.stdout.splitlines()[-2]
    assert "not converted" in run("inspect", folder / "plain").stdout


def test_a_dry_run_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    done = run("convert", folder / "plain", folder / "new", "--dry-run")
    assert done.returncode == 0
    assert "nothing was written" in done.stdout
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("plain", ["--init", "paper"], "init must be"),
        ("plain", ["--layers", "7"], "layers must be some of [0, 1]"),
        ("nothing", [], "cannot be loaded"),
        ("empty", [], "cannot be loaded"),
        ("damaged", [], "cannot be loaded"),
        ("converted", [], "converted already"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(folder, source, options, words):
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    ssmax.convert(tiny_model("llama")).save_pretrained(folder / "converted")
    before = sorted(folder.iterdir())
    done = run("convert", folder / source, folder / "new", *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert sorted(folder.iterdir()) == before


def test_a_target_that_exists_is_never_overwritten(folder):
    done = run("convert", folder / "plain", folder / "plain")
    assert done.returncode == 2
    assert "exists already" in done.stderr
