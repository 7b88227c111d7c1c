"""Checkpoints inside a training: one counts only once it is sealed, with its owner and the hash of each file."""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from ssmax.errors import Damaged
from ssmax.runs.files import SEAL, check_folder, seal_folder

__all__ = ["copy", "newest", "owner", "seal"]


def owner(folder: Path, recipe: Any) -> str:
    """Return the owner of a model's subfolder: that model, stage, and run of that recipe.

    Args:
        folder: MODEL/STAGE.
        recipe: the settings, a dataclass. Fields that older versions did not have, as recipe.later holds them, count only where
            they differ from what these versions did.
    """
    told = {name: value for name, value in asdict(recipe).items() if recipe.later.get(name, ...) != value}
    settings = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    return f"{folder.parent.name} {folder.name} of recipe {settings}"


def seal(checkpoint: Path, whose: str) -> None:
    """Sync and seal a checkpoint once all ranks have written their share of it."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        seal_folder(checkpoint, whose)


def copy(checkpoint: Path, folder: Path, whose: str) -> None:
    """Copy a checkpoint that is not sealed yet into the folder of another training, and seal the copy for its owner."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint, folder / checkpoint.name)
    seal(folder / checkpoint.name, whose)


def newest(folder: Path, whose: str) -> Path | None:
    """Return the newest whole checkpoint of an owner in folder, the same on all ranks, and remove what is none.

    Args:
        folder: folder of one training.
        whose: the owner that seal was told, so that a checkpoint of another model or run is not continued.
    """
    state = PartialState()
    if state.is_main_process:
        for checkpoint in folder.glob("checkpoint-*"):
            try:
                check_folder(checkpoint, whose)
            except Damaged as error:
                if (checkpoint / SEAL).exists():  # without one the run was killed in its midst, which is no news
                    tqdm.write(f"ssmax: {error}; it is not continued", file=sys.stderr)
                shutil.rmtree(checkpoint)
    state.wait_for_everyone()
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), default=None)
