"""Training on several ranks: real torchrun processes, a real killed rank, a restart on another number of ranks."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults import PATIENCE, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer

import ssmax.hf  # noqa: F401
from ssmax.errors import UserError
from ssmax.runs.rows import read_rows
from ssmax.training import checkpoints, loop

STEPS = 40
TRAIN = ["train", "--recipe", "smoke", "--form", "qk-norm", "--checkpoint-steps", "10", "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    rng = random.Random(1)
    words = ["".join(rng.choice("abcdefgh") for _ in range(5)) for _ in range(60)]
    for i in range(30):
        (root / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(900)))
    return root


def start(ranks, *arguments):
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return subprocess.Popen(
        [*launcher, "ssmax", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run(ranks, *arguments):
    process = start(ranks, *arguments)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err[-3000:]
    return out


def losses(folder):
    return {row.at["step"]: row.value for row in read_rows(folder / "rows.jsonl") if row.metric == "train_loss"}


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    out = run(1, *TRAIN, folder / "run", "--corpus", corpus)
    assert f"Model: {folder / 'run' / 'model'}" in out
    return folder / "run"


def test_a_trained_model_loads_with_its_tokenizer(alone):
    model, tokenizer = (kind.from_pretrained(alone / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert "ssmax" in vars(model.config)
    tokens = tokenizer("abcde fghab", return_tensors="pt")["input_ids"]
    assert model(tokens).logits.shape[-1] == len(tokenizer)
    assert set(losses(alone)) == set(range(1, STEPS + 1))
    assert losses(alone)[STEPS] < losses(alone)[1] - 1


@pytest.mark.parametrize(("ranks", "shard"), [(2, False), (4, False), (2, True), (4, True)])
def test_any_number_of_ranks_ends_with_the_same_losses(ranks, shard, alone, corpus, tmp_path):
    rounds = ["--device-batch-size", "1"] if ranks == 2 else []  # the rest of a step accumulates
    run(ranks, *TRAIN, tmp_path / "run", "--corpus", corpus, *rounds, *["--shard"] * shard)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-5)


def mark_history(folder):
    """Write another first loss into the checkpoint, which only a run that continues it can report."""
    newest = max(folder.glob("models/*/pretrain-checkpoints/checkpoint-*/seal.json")).parent
    owner = json.loads((newest / "seal.json").read_text())["owner"]
    state = json.loads((newest / "trainer_state.json").read_text())
    state["log_history"][0]["loss"] = 99
    (newest / "trainer_state.json").write_text(json.dumps(state))
    checkpoints.seal(newest, owner)


@pytest.mark.parametrize(("before", "after", "shard"), [(2, 4, False), (4, 2, True)])
def test_a_killed_rank_costs_nothing(before, after, shard, alone, corpus, tmp_path):
    command = [*TRAIN, tmp_path / "run", "--corpus", corpus, *["--shard"] * shard]
    process = start(before, *command)
    wait_for(lambda: list(tmp_path.glob("run/models/*/pretrain-checkpoints/checkpoint-*/seal.json")), process)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert not (tmp_path / "run" / "model").exists()
    mark_history(tmp_path / "run")
    run(after, *command)
    found = losses(tmp_path / "run")
    assert found.pop(1) == 99, "the training began anew"
    assert found == pytest.approx({step: loss for step, loss in losses(alone).items() if step > 1}, abs=1e-5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.ssmax["law"] == "ssmax"


def test_ranks_share_the_measurements_too(corpus, tmp_path):
    small = ["--models", "paper:abe", "--retrieval", "paper:a", "--counting", "paper:b", "--steps", "8"]
    small += ["--score-trials", "2", "--finetune-steps", "4", "--count-steps", "4"]
    for ranks in (1, 2):
        run(ranks, "reproduce", "smoke", "--corpus", corpus, "--out", tmp_path / f"{ranks}", *small)
    one, two = (read_rows(tmp_path / f"{ranks}" / "rows.jsonl") for ranks in (1, 2))
    assert [(r.metric, r.variant, r.at) for r in one if r.metric != "top_needle_score"] == [
        (r.metric, r.variant, r.at) for r in two if r.metric != "top_needle_score"
    ]
    assert [r.value for r in two] == pytest.approx([r.value for r in one], abs=1e-4)
    assert (tmp_path / "2" / "report.html").exists()


def test_a_batch_that_the_ranks_cannot_share(corpus, tmp_path):
    process = start(3, *TRAIN, tmp_path / "run", "--corpus", corpus)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "a batch of 8 cannot be shared by 3 ranks" in err


@pytest.mark.parametrize(
    ("ranks", "device_batch", "want"), [(1, 8, (8, 1)), (2, 8, (4, 1)), (2, 3, (2, 2)), (4, 1, (1, 2)), (1, 5, (4, 2))]
)
def test_the_step_stays_the_same(ranks, device_batch, want, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    found = loop.batch_arguments(8, device_batch)
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == want
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="8 cannot be shared by 3"):
        loop.batch_arguments(8, device_batch)


def test_only_whole_checkpoints_count(tmp_path):
    for step in (10, 20, 30):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights" * 100)
        (folder / "optimizer.pt").write_bytes(b"state" * 100)
        if step != 30:
            checkpoints.seal(folder, "me")
    assert checkpoints.newest(tmp_path, "me") == tmp_path / "checkpoint-20"
    assert not (tmp_path / "checkpoint-30").exists()
    damaged = bytearray((tmp_path / "checkpoint-20" / "optimizer.pt").read_bytes())
    damaged[7] ^= 1
    (tmp_path / "checkpoint-20" / "optimizer.pt").write_bytes(damaged)
    assert checkpoints.newest(tmp_path, "me") == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "model.safetensors").unlink()
    assert checkpoints.newest(tmp_path, "me") is None
