import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ssmax

ROOT = Path(__file__).parent.parent
ATTEND = """
import torch, ssmax
q = torch.ones(1, 1, 4, 16, requires_grad=True)
ssmax.attention(q, q, q, 0.4, is_causal=True, window=2).sum().backward()
"""
HEAVY = ("numpy", "torch", "transformers", "triton", "matplotlib", "datasets")


def loaded_after(statement):
    code = f"{statement}\nimport sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import ssmax", set()),
        ("import ssmax.cli", set()),
        ("from ssmax import attention, SSMaxScale, visible_keys, scalable_softmax", {"torch", "numpy"}),
        ("import ssmax.paper.report, ssmax.compare.report", {"numpy"}),
        (ATTEND, {"torch", "numpy"}),
    ],
)
def test_imports_stay_light(statement, allowed):
    assert set(loaded_after(statement)) <= allowed


def test_public_names():
    assert len(ssmax.__all__) <= 20
    for name in ssmax.__all__:
        assert getattr(ssmax, name).__doc__
    for name in ("attention", "convert", "scalable_softmax", "visible_keys", "SSMaxScale"):
        assert callable(getattr(ssmax, name))
        assert name in dir(ssmax)
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        _ = ssmax.softmax


def test_the_readmes_example_runs():
    example = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    subprocess.run([sys.executable, "-W", "ignore", "-c", example], check=True)


def test_the_page_of_faults_is_made_from_its_rows():
    page = runpy.run_path(str(ROOT / "docs" / "faults.py"))["page"]
    assert (ROOT / "docs" / "faults.md").read_text() == page()


def test_the_numbers_of_the_pages_are_made_from_rows():
    module = runpy.run_path(str(ROOT / "docs" / "reproduced.py"))
    for path in module["PAGES"]:
        text = path.read_text()
        assert text == module["page"](text), path.name
