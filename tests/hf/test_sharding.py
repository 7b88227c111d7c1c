"""FSDP and tensor parallelism of converted models, on two real gloo processes; see programs/ranks.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

import ssmax.hf
from ssmax import SSMaxScale
from ssmax.hf.checkpoint import refuse_split_heads

PROGRAM = str(Path(__file__).parent.parent / "programs" / "ranks.py")
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(*command):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: float(value) for name, value in re.findall(r"^([\w ]+): ([\d.]+)$", done.stdout, re.MULTILINE)}


def test_fsdp_trains_as_one_process():
    """The update of s and b, relative to one process: 1 for one that is lost, about 0.7 for that of one rank alone."""
    errors = run(*TWO_RANKS, PROGRAM, "sharded")
    assert len(errors) == 8
    assert max(errors.values()) < 0.2, errors
    assert errors["FSDP2 float32"] < 1e-3


def test_tensor_parallel_trains_as_one_process(tmp_path):
    run(sys.executable, PROGRAM, "save", str(tmp_path))
    assert run(*TWO_RANKS, PROGRAM, "tensor", str(tmp_path)) == {"tensor parallel": 0.0}


def test_heads_that_ranks_cannot_share_are_refused():
    model = ssmax.convert(tiny_model("llama"), 0.5)
    model._tp_size = 4
    with pytest.raises(ValueError, match=r"over 4 ranks .* got \[2\]"):
        refuse_split_heads(model)
    model._tp_size = 2
    refuse_split_heads(model)


def test_a_query_of_other_heads_names_tensor_parallelism():
    with pytest.raises(ValueError, match="tensor parallelism"):
        SSMaxScale(4)(torch.zeros(1, 2, 3, 8), 3)
