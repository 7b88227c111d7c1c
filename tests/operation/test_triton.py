"""impl="triton": the kernel in Triton's interpreter and compiled for GPUs, each in its own process, and what it refuses.

TRITON_INTERPRET must be set before triton is imported, and torch.compile's tests must not see it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssmax import attention

PROGRAMS = Path(__file__).parent.parent / "programs"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux")


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=PROGRAMS.parent / "support",
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@on_linux
def test_it_equals_the_reference_in_the_interpreter():
    printed = run("-m", "pytest", "-p", "no:cacheprovider", PROGRAMS / "interpreted.py", TRITON_INTERPRET="1")
    assert int(printed.rsplit(" passed", 1)[0].split()[-1]) >= 20
    assert "skipped" not in printed


@on_linux
def test_it_compiles_for_gpus_and_fits_their_shared_memory(tmp_path):
    lines = run(PROGRAMS / "compiled.py", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    shared = {line.rsplit(" ", 1)[0]: int(line.rsplit(" ", 1)[1]) for line in lines}
    assert len(shared) == 15
    for name, size in shared.items():
        # 99 KiB is the least of all GPUs since sm_80; Triton compiles another way for sm_100, whose blocks have 227 KiB.
        assert 0 < size <= (227 if name.endswith("sm_100") else 99) * 1024, name


Q = torch.ones(1, 2, 3, 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "tensors on cpu"),
        ({"attn_mask": torch.ones(3, 3, dtype=torch.bool)}, "an attn_mask"),
        ({"softcap": 5.0}, "a softcap"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"query": Q.double(), "key": Q.double(), "value": Q.double()}, "torch.float64"),
        ({"value": Q.expand(1, 2, 3, 16)[..., :8]}, r"head sizes \[8, 16\]"),
        ({"query": Q.repeat(1, 1, 1, 3), "key": Q.repeat(1, 1, 1, 3)}, r"head sizes \[16, 48\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_cannot_do_is_refused(arguments, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"impl='triton' does not compute {words}"):
        attention(**({"query": Q, "key": Q, "value": Q, "s": 0.4, "impl": "triton"} | arguments))
