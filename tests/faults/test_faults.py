"""Runs that are killed, stopped and starved for real: each continues and ends with the rows of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from faults import (
    PATIENCE,
    REPRODUCE,
    TRAIN,
    Forks,
    alive,
    frozen_while_writing,
    gone,
    half_written,
    kill,
    make_corpus,
    values,
    whole,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(scope="module")
def trained(forks, corpus, tmp_path_factory):
    """The rows of an undisturbed training, and its time."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    started = time.monotonic()
    assert forks.run("train", folder, *TRAIN, "--corpus", corpus)[0] == 0
    return values(folder / "rows.jsonl"), time.monotonic() - started


@pytest.fixture(scope="module")
def reproduced(forks, corpus, tmp_path_factory):
    """An undisturbed run of all stages."""
    folder = tmp_path_factory.mktemp("reproduced") / "run"
    status, told = forks.run("reproduce", *REPRODUCE, "--out", folder, "--corpus", corpus)
    assert status == 0, told
    return folder


def wait_until(condition, pid):
    """Wait for a moment in a run; False if the run ended before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if not alive(pid):
            return False
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    return True


def test_a_training_killed_at_20_moments(forks, corpus, trained, tmp_path, record):
    rows, duration = trained
    rng = random.Random(0)
    kills, finished, writing, left, run = 0, 0, 0, set(), tmp_path / "0"
    while kills < 20:
        pid = forks.start("train", run, *TRAIN, "--corpus", corpus)
        if kills % 3 == 0:  # while a checkpoint is written
            struck = wait_until(lambda run=run, pid=pid, left=left: frozen_while_writing(pid, run, left), pid)
        else:
            ends = time.monotonic() + rng.uniform(0.05, duration)
            struck = wait_until(lambda ends=ends: time.monotonic() > ends, pid)
        kill(pid, "all", rng)
        status, told = forks.end()
        gone(pid)
        if struck and status == -signal.SIGKILL:
            kills += 1
            writing += bool(half_written(run) - left)
            left = half_written(run)
            if kills % 10:
                continue
            status, told = forks.run("train", run, *TRAIN, "--corpus", corpus)
        assert status == 0, told
        assert values(run / "rows.jsonl") == rows
        assert whole(run)
        finished, run, left = finished + 1, tmp_path / str(kills), set()
    assert writing >= 7  # each third
    assert finished >= 2
    record("ssmax train killed (SIGKILL) at random moments", kills, while_a_checkpoint_was_written=writing)


STAGES = ["pretrain", "position_loss", "finetune", "retrieval", "count", "counting"]


def reached(run, stage):
    """Whether job b has come to a stage: the one before it has left its rows."""
    before = ["formula", *(f"paper-b-0.{name}" for name in STAGES)][STAGES.index(stage)]
    return (run / "stages" / f"{before}.jsonl").exists()


def test_reproduce_killed_at_20_moments_in_every_stage(forks, corpus, reproduced, tmp_path, record):
    """Each kill hits what the one before has left; a run that came to its end is compared, and another one begun."""
    rng = random.Random(1)
    moments = ["tokenising", "start", *["checkpoint"] * 4, *(s for s in STAGES for _ in range(2)), "start", "report"]
    assert len(moments) == 20
    struck, runs, missed, left = [], 0, 0, set()
    while len(struck) < len(moments):
        name = moments[len(struck)]
        home = tmp_path / str(runs)
        run = home / "run"
        command = ["reproduce", *REPRODUCE, "--out", run, "--corpus", corpus]
        begun = name in STAGES and reached(run, name)
        pid = forks.start(*command)
        hit = wait_until(
            {
                "tokenising": lambda home=home: any(home.glob("cache/*/.lock")),
                "start": lambda: True,
                "checkpoint": lambda run=run, left=left: half_written(run) - left,
                "report": lambda run=run: (run / "rows.jsonl").exists(),
            }.get(name, lambda run=run, name=name: reached(run, name)),
            pid,
        )
        # Where the stage had begun before, its workers are starting now, or at it again.
        delay = {"tokenising": 0.02, "checkpoint": 0.0, "report": 0.2, "start": 2.0}.get(name, 2.0 if begun else 0.3)
        ends = time.monotonic() + rng.uniform(0, delay)
        hit = hit and wait_until(lambda ends=ends: time.monotonic() > ends, pid)
        kill(pid, ("all", "leader", "worker")[len(struck) % 3 if name in ("checkpoint", *STAGES) else 0], rng)
        status, told = forks.end()
        gone(pid)
        assert status in (0, 1, -signal.SIGKILL), told
        assert status != 1 or "a worker process was killed (out of memory?); the same command continues" in told
        if hit and status != 0:
            struck.append(name)
            left = half_written(run)
        else:
            missed += 1
            assert missed < 20
        if status == 0 or len(struck) == len(moments):
            assert forks.run(*command)[0] == 0
            assert values(run / "rows.jsonl") == values(reproduced / "rows.jsonl")
            assert whole(run)
            runs, left = runs + 1, set()
    record("ssmax reproduce killed (SIGKILL: leader, worker or all) in every stage", len(struck))


@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_stopped_training_saves_and_says_how_to_continue(number, word, forks, corpus, trained, tmp_path, record):
    rows, duration = trained
    rng = random.Random(2)
    saved, tries = 0, 0
    while saved < 5:
        tries += 1
        assert tries < 40
        run = tmp_path / str(tries)
        command = ["train", run, *TRAIN[:-1], "1000", "--corpus", corpus]  # it makes no checkpoint but that of the stop
        pid = forks.start(*command)
        wait_until(lambda run=run: any(run.glob("models/*/pretrain-checkpoints")), pid)
        ends = time.monotonic() + rng.uniform(0, duration / 2)  # somewhere; where it was is seen afterwards
        wait_until(lambda ends=ends: time.monotonic() > ends, pid)
        os.kill(pid, number)
        status, told = forks.end()
        if status == 0:  # it had come to its end
            continue
        assert status == 128 + number
        assert (
            told.splitlines()[-1] == f"ssmax: stopped by {word}; the same command continues, finished stages are kept"
        )
        assert "Traceback" not in told
        checkpoints = list(run.glob("models/*/pretrain-checkpoints/checkpoint-*"))
        assert len(checkpoints) <= 1  # none where the stop came before the first step, or behind the last
        for checkpoint in checkpoints:
            assert (checkpoint / "seal.json").exists()
            step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
            assert 0 < step <= 120
            saved += step < 120
        status, told = forks.run(*command)
        assert status == 0, told
        assert values(run / "rows.jsonl") == rows
        assert whole(run)
    record(f"ssmax train stopped by {word}", saved)


@pytest.mark.parametrize(("number", "stage"), [(signal.SIGTERM, "finetune"), (signal.SIGINT, "retrieval")])
def test_a_stopped_reproduction_saves_in_its_workers(number, stage, forks, corpus, reproduced, tmp_path, record):
    run = tmp_path / "run"
    command = ["reproduce", *REPRODUCE, "--out", run, "--corpus", corpus]
    pid = forks.start(*command)
    training = run / "models" / "paper-b-0" / "finetune-checkpoints"
    assert wait_until(lambda: training.exists() if stage == "finetune" else reached(run, stage), pid)
    (os.kill if number == signal.SIGTERM else os.killpg)(pid, number)
    status, told = forks.end()
    gone(pid)
    assert status == 128 + number
    assert told.splitlines()[-1].endswith("the same command continues, finished stages are kept")
    assert "Traceback" not in told
    if stage == "finetune":
        assert any(run.glob("models/*/*-checkpoints/checkpoint-*/seal.json"))
    status, told = forks.run(*command)
    assert status == 0, told
    assert values(run / "rows.jsonl") == values(reproduced / "rows.jsonl")
    assert whole(run)
    record(f"ssmax reproduce stopped by {signal.Signals(number).name}", 1)


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine mounts no tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk, leave):
    """Leave so many bytes free."""
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"\0" * max(0, free - leave))


def one_line(told):
    """The one line that the command said, behind its progress bar."""
    lines = [line for line in told.splitlines() if line.startswith("ssmax: ")]
    assert len(lines) == 1, told
    assert "Traceback" not in told
    return lines[0]


def test_a_training_on_a_full_disk(forks, corpus, trained, disk, record):
    """The disk has room for more and more of the run, so that another file is cut short each time."""
    run = disk / "runs" / "run"
    command = ["train", run, *TRAIN, "--corpus", corpus]
    failures, kept = 0, {}
    for leave in (0, 20_000, 60_000, 100_000, 150_000, 200_000, 260_000, 340_000, 420_000):
        fill(disk, leave)
        status, told = forks.run(*command)
        if status:
            failures += 1
            assert status == 1
            assert "No space left on device" in one_line(told)
        assert all(path.read_bytes() == content for path, content in kept.items())
        kept = {path: path.read_bytes() for path in run.glob("stages/*.jsonl")}
        (disk / "filler").unlink()
    status, told = forks.run(*command)
    assert status == 0, told
    assert values(run / "rows.jsonl") == trained[0]
    assert whole(run)
    assert failures >= 5
    record("ssmax train on a full disk", failures)


def test_a_reproduction_on_a_full_disk(forks, corpus, reproduced, disk, record):
    run = disk / "runs" / "run"
    command = ["reproduce", *REPRODUCE, "--out", run, "--corpus", corpus]
    failures = 0
    for leave in (0, 150_000, 300_000, 500_000):
        fill(disk, leave)
        status, told = forks.run(*command)
        if status:
            failures += 1
            assert status == 1
            assert "No space left on device" in one_line(told)
        (disk / "filler").unlink()
    status, told = forks.run(*command)
    assert status == 0, told
    assert values(run / "rows.jsonl") == values(reproduced / "rows.jsonl")
    assert whole(run)
    assert failures >= 2
    record("ssmax reproduce on a full disk", failures)


def test_a_read_only_disk(forks, corpus, trained, disk, record):
    """Before anything was written, and in the midst of a run."""
    run = disk / "runs" / "run"
    command = ["train", run, *TRAIN, "--corpus", corpus]
    for begun in (False, True):
        if begun:
            pid = forks.start(*command)
            assert wait_until(lambda: any(run.glob("models/*/*/checkpoint-*/seal.json")), pid)
            os.kill(pid, signal.SIGKILL)
            forks.end()
        kept = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        status, told = forks.run(*command)
        assert status == 2
        assert "Read-only file system" in one_line(told)
        assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == kept
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    status, told = forks.run(*command)
    assert status == 0, told
    assert values(run / "rows.jsonl") == trained[0]
    record("a read-only disk", 2)


def test_a_corpus_that_vanishes(forks, corpus, reproduced, tmp_path, record):
    text = shutil.copytree(corpus, tmp_path / "text")
    run = tmp_path / "run"
    command = ["reproduce", *REPRODUCE, "--out", run, "--corpus", text]
    # The text itself is read once; the run goes on without it.
    pid = forks.start(*command)
    assert wait_until((run / "recipe.json").exists, pid)
    shutil.rmtree(text)
    shutil.rmtree(tmp_path / "cache")
    status, told = forks.end()
    gone(pid)
    if status:  # what is missing is named, or the disk's own words are told
        assert status in (1, 2)
        assert str(tmp_path / "cache") in one_line(told)
    kept = {path: path.read_bytes() for path in run.glob("stages/*.jsonl")}
    if not (run / "rows.jsonl").exists():
        status, told = forks.run(*command)
        assert status == 2
        assert "does not exist" in one_line(told)
    shutil.copytree(corpus, text)
    status, told = forks.run(*command)
    assert status == 0, told
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert values(run / "rows.jsonl") == values(reproduced / "rows.jsonl")
    record("a corpus and its tokens that vanish during the run", 1)


def test_two_trainings_in_one_folder(forks, corpus, trained, tmp_path, record):
    """A real second process, and the first one is not disturbed."""
    other = Forks(tmp_path)
    run = tmp_path / "run"
    command = ["train", run, *TRAIN, "--corpus", corpus]
    pid = forks.start(*command)
    try:
        assert wait_until((run / "recipe.json").exists, pid)
        os.killpg(pid, signal.SIGSTOP)  # it keeps its lock, and does not end before the second has begun
        status, told = other.run(*command)
    finally:
        os.killpg(pid, signal.SIGCONT)
        other.close()
    assert status == 2
    assert f"another process runs in {run}" in one_line(told)
    status, told = forks.end()
    assert status == 0, told
    assert values(run / "rows.jsonl") == trained[0]
    record("a second run in the folder of a first", 1)
