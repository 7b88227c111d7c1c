"""What the tests of faults share: commands as real processes that start at once, small runs, and what a run left."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from ssmax.runs.files import check_folder
from ssmax.runs.rows import read_rows

# Seconds after which a wait is a hang on any machine: a guard, by which nothing is judged.
PATIENCE = 900
PROGRAM = Path(__file__).parent.parent / "programs" / "forks.py"
SMALL = [
    *("--hidden-size", "16", "--num-heads", "2", "--intermediate-size", "24", "--train-length", "64"),
    *("--batch-size", "8", "--finetune-batch-size", "4", "--loss-texts", "2", "--score-trials", "2"),
]
TRAIN = ["--recipe", "smoke", *SMALL, "--steps", "120", "--checkpoint-steps", "7"]
REPRODUCE = [
    *("smoke", *SMALL, "--models", "paper:ab", "--retrieval", "paper:ab", "--counting", "paper:b", "--steps", "40"),
    *("--checkpoint-steps", "7", "--finetune-steps", "20", "--count-steps", "20"),
]


class Forks:
    """Starts commands from a process that has loaded torch already; one at a time."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout.readline().strip() == "ready"

    def start(self, *arguments):
        """Start a command; return its process id, which is also its group's."""
        wanted = {
            "arguments": [str(a) for a in arguments],
            "out": str(self.folder / "out.txt"),
            "err": str(self.folder / "err.txt"),
        }
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """Wait for the command; return its exit status and what it wrote to stderr."""
        status = int(self.process.stdout.readline())
        return status, (self.folder / "err.txt").read_text()

    def run(self, *arguments):
        self.start(*arguments)
        return self.end()

    def completed(self, *arguments):
        """Run a command; return what subprocess.run would."""
        status, err = self.run(*arguments)
        return subprocess.CompletedProcess(arguments, status, (self.folder / "out.txt").read_text(), err)

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=PATIENCE)
        self.process.stdout.close()


def make_corpus(root, documents=30):
    root.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    words = ["".join(rng.choice("abcdefgh") for _ in range(5)) for _ in range(60)]
    for i in range(documents):
        (root / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(900)))
    return root


def values(path):
    """All rows without their provenance, whose time differs."""
    return [(r.metric, r.variant, r.seed, r.at, r.value, r.samples) for r in read_rows(path)]


def whole(folder):
    """All that a finished run keeps is sealed and intact, and nothing half-written is left."""
    for seal in folder.rglob("seal.json"):
        check_folder(seal.parent)
    assert not list(folder.rglob("*.tmp"))
    return True


def wait_for(condition, process, poll=0.01):
    """Wait for a moment in a command that was started with its stderr piped; it must not end before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(poll)


def gone(pid):
    """Wait until no process of a group lives any more."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "a worker outlived the run"
        time.sleep(0.02)


def alive(pid):
    """Whether the leader of a group still runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def half_written(folder):
    """Checkpoints that are being written at this moment."""
    found = folder.glob("models/*/*-checkpoints/checkpoint-*")
    return {checkpoint for checkpoint in found if not (checkpoint / "seal.json").exists()}


def frozen_while_writing(pid, folder, left):
    """Stop a group where a checkpoint is half-written that was not among those left; it goes on if that has just ended."""
    if not half_written(folder) - left:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGSTOP)
    if half_written(folder) - left:
        return True
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGCONT)
    return False


def kill(pid, whom, rng):
    """SIGKILL the leader alone, one of its workers, or the whole group; it may have ended by itself."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if whom == "worker" and workers:
            os.kill(int(rng.choice(workers)), signal.SIGKILL)
        elif whom == "leader":
            os.kill(pid, signal.SIGKILL)
        else:
            os.killpg(pid, signal.SIGKILL)
