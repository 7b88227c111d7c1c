"""The programs in examples/ run, each in a folder of its own; what they show they assert themselves."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "pretrain_litgpt": "litgpt",
    "pretrain_torchtitan": "torchtitan",
    "pretrain_lightning": "lightning",
}  # make test-modules


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name, tmp_path):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"make test-modules installs {NEEDS[name]}")
    command = [sys.executable, "-W", "ignore", EXAMPLES / f"{name}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
