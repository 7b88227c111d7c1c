"""Ranks that are killed, hang or are not like the others: the run ends in bounded time, names the rank, and continues."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rounding
import torch
from faults import PATIENCE, TRAIN, make_corpus, values, wait_for, whole

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent.parent / "programs" / "unlike.py"
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("text") / "text")


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *RANKS, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run(*arguments):
    process = start("-m", "ssmax", *arguments)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told[-3000:]


@pytest.fixture(scope="module")
def together(corpus, tmp_path_factory):
    """The rows of an undisturbed training on two ranks."""
    folder = tmp_path_factory.mktemp("together") / "run"
    run("train", folder, *TRAIN, "--corpus", corpus)
    return values(folder / "rows.jsonl")


def same(got, want):
    """The same rows, but for the rounding of a loss that is logged.

    That is a mean over two steps and two ranks in float32. A checkpoint between the two steps holds the mean over the ranks,
    so that the same numbers are added in another order: three sums and a quotient, on either side, for the trainer and for us.
    """
    for (metric, *mine, value, samples), (name, *theirs, wanted, count) in zip(got, want, strict=True):
        assert (metric, mine, samples) == (name, theirs, count)
        bound = rounding.gamma(16, rounding.unit(torch.float32)) * wanted if metric == "train_loss" else 0.0
        assert abs(value - wanted) <= bound, (metric, mine)
    return True


def started(process, folder):
    """Wait until the second checkpoint is sealed; return the process ids of the ranks by their number."""
    wait_for(lambda: len(list(folder.glob("models/*/pretrain-checkpoints/checkpoint-*/seal.json"))) >= 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        environment = dict(x.split("=", 1) for x in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in x)
        ranks[int(environment["RANK"])] = int(child)
    return ranks


@pytest.mark.parametrize(("number", "fault"), [(signal.SIGKILL, "killed"), (signal.SIGSTOP, "hangs")])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_gone_is_named(rank, number, fault, corpus, together, tmp_path, record):
    command = ["train", tmp_path / "run", *TRAIN, "--corpus", corpus, "--timeout-minutes", "0.1"]
    process = start("-m", "ssmax", *command)
    os.kill(started(process, tmp_path / "run")[rank], number)
    # 6 s until the other one gives up, 5 s to ask around, 30 s until torchrun kills what does not end; by default two hours.
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert f"ssmax: rank {rank} does not answer: it hangs or was killed" in told
    assert not (tmp_path / "run" / "model").exists()
    run(*command)
    assert values(tmp_path / "run" / "rows.jsonl") == together
    assert whole(tmp_path / "run")
    record(f"a rank of two {fault}", 1)


@pytest.mark.parametrize("what", ["version", "corpus"])
def test_ranks_that_are_not_alike_write_nothing(what, corpus, tmp_path, record):
    other = make_corpus(tmp_path / "other", 20)
    command = ["train", tmp_path / "run", *TRAIN, "--corpus", corpus]
    process = start(PROGRAM, what if what == "version" else other, *command)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert f"ssmax: rank 1 has another {what} than rank 0" in told
    assert "nothing was written" in told
    assert [path.name for path in (tmp_path / "run").rglob("*")] == [".lock"]
    record(f"a rank with another {what}", 1)


def test_stopped_ranks_save_together(corpus, together, tmp_path, record):
    command = ["train", tmp_path / "run", *TRAIN[:-1], "30", "--corpus", corpus]
    process = start("-m", "ssmax", *command)
    seals = "run/models/*/pretrain-checkpoints/checkpoint-*/seal.json"
    wait_for(lambda: list(tmp_path.glob(seals)), process)  # before its first step a training has nothing to save
    process.terminate()
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "ssmax: stopped by SIGTERM; the same command continues" in told
    states = [seal.with_name("trainer_state.json") for seal in tmp_path.glob(seals)]
    newest = max(json.loads(state.read_text())["global_step"] for state in states)
    assert 30 < newest <= 120, "the stop saved nothing"
    run(*command)
    assert same(values(tmp_path / "run" / "rows.jsonl"), together)
    record("torchrun stopped by SIGTERM", 1)
