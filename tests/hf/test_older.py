"""Checkpoints that older versions wrote load for good: tests/golden/checkpoints, written by tests/support/older.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from older import KINDS, TOKENS
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import ssmax
import ssmax.hf
from ssmax.hf.spec import ScaleSpec
from ssmax.laws import LAWS

FOLDER = Path(__file__).parent.parent / "golden" / "checkpoints"
WORDS = {
    "learned": "law s log n, init 0.5",
    "bias": "law s log n + b, init identity",
    "folded": "law log n (s is folded into q_proj), init matched",
    "fixed": "law yarn, factor 40",
    "networks": "law query-aware, b 0, hidden_size 4, s 0.",
    "encoder": "law s log n, init matched",
}


def load(folder):
    auto = AutoModelForMaskedLM if "encoder" in str(folder) else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def logits(folder):
    return torch.tensor(json.loads((folder / "logits.json").read_text()))


@pytest.mark.parametrize("kind", WORDS)
def test_it_computes_what_it_computed_and_is_saved_with_fields(kind, tmp_path):
    assert set(WORDS) == set(KINDS)
    model = load(FOLDER / kind)
    # Float32 on another processor: logits near 1, some hundred roundings of 6e-8 each.
    torch.testing.assert_close(model(TOKENS).logits[0, -1], logits(FOLDER / kind), rtol=0, atol=1e-5)
    spec = ScaleSpec.of(model.config, type(model))
    assert str(spec).startswith(WORDS[kind])
    assert spec.law in LAWS
    model.save_pretrained(tmp_path / kind)
    again = load(tmp_path / kind)
    assert (
        again.config.ssmax == model.config.ssmax == json.loads((tmp_path / kind / "config.json").read_text())["ssmax"]
    )
    assert again.config.ssmax["law"] == spec.law
    assert again.config.ssmax.get("folded") == (True if kind == "folded" else None)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert not hasattr(ssmax.revert(again).config, "ssmax")


def test_its_own_code_computes_the_same_without_ssmax():
    code = f"""
import sys
sys.modules["ssmax"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(FOLDER / "learned")!r}, trust_remote_code=True).eval()
print(model(torch.arange(12)[None] % 17).logits[0, -1].tolist())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(got, logits(FOLDER / "learned"), rtol=0, atol=1e-5)
