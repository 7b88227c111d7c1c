"""The programs in examples/ run, each in a folder of its own; what they show they assert themselves."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "pretrain_litgpt": ("litgpt", "make test-modules"),
    "pretrain_torchtitan": ("torchtitan", "make test-modules"),
    "pretrain_lightning": ("lightning", "make test-modules"),
    "pretrain_axolotl": ("axolotl", "make test-axolotl"),
    "pretrain_unsloth": ("unsloth", "make test-unsloth"),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name, tmp_path):
    package, target = NEEDS.get(name, ("ssmax", ""))
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{target} installs {package}")
    command = [sys.executable, "-W", "ignore", EXAMPLES / f"{name}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
