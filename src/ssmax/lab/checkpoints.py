"""Checkpoints inside a training: one counts only once it is sealed, with the size and hash of each file."""

import hashlib
import json
import shutil
from pathlib import Path

from accelerate import PartialState

from ssmax.results import write_atomically

__all__ = ["newest", "seal"]

SEAL = "seal.json"


def seal(checkpoint: Path, is_main: bool) -> None:
    """Write the seal of a checkpoint once all ranks have written their share of it."""
    PartialState().wait_for_everyone()
    if is_main:
        write_atomically(checkpoint / SEAL, json.dumps(_hashes(checkpoint), indent=1) + "\n")


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in folder, the same on all ranks, and remove what is damaged or half written."""
    state = PartialState()
    if state.is_main_process:
        for checkpoint in folder.glob("checkpoint-*"):
            if not _whole(checkpoint):
                shutil.rmtree(checkpoint)
    state.wait_for_everyone()
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _whole(checkpoint):
    try:
        return json.loads((checkpoint / SEAL).read_text()) == _hashes(checkpoint)
    except (OSError, json.JSONDecodeError):
        return False


def _hashes(checkpoint):
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL and path.suffix != ".tmp":
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                for block in iter(lambda: file.read(2**20), b""):
                    digest.update(block)
            found[str(path.relative_to(checkpoint))] = digest.hexdigest()
    return found
