"""Checkpoints inside a training. A checkpoint counts only when it is sealed, with its owner and the hash of each file."""

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


def owner(folder: Path, recipe: Any) -> str:
    """Return the owner of a folder of checkpoints or of a saved model: model, folder name, and a hash of the recipe.

    Args:
        folder: the folder, inside the model's own.
        recipe: the settings, a dataclass. Fields in recipe.later, which older versions did not
            have, count only if they differ from what those versions did.
    """
    told = {name: value for name, value in asdict(recipe).items() if recipe.later.get(name, ...) != value}
    settings = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    return f"{folder.parent.name} {folder.name} of recipe {settings}"


def seal(checkpoint: Path, whose: str) -> None:
    """Sync and seal a checkpoint after all ranks have written their part."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        seal_folder(checkpoint, whose)


def copy(checkpoint: Path, folder: Path, whose: str) -> None:
    """Copy a checkpoint that is not sealed yet into the folder of another training, and seal the copy for its owner."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder / checkpoint.name, ignore_errors=True)
        shutil.copytree(checkpoint, folder / checkpoint.name)
    seal(folder / checkpoint.name, whose)


def newest(folder: Path, whose: str) -> Path | None:
    """Return the newest complete checkpoint of an owner in a folder, the same on all ranks. Delete all other owners' and broken ones.

    Args:
        folder: folder of one training.
        whose: the owner that was given to seal, so that no checkpoint of another model or run is
            continued.
    """
    state = PartialState()
    if state.is_main_process:
        for checkpoint in folder.glob("checkpoint-*"):
            try:
                check_folder(checkpoint, whose)
            except Damaged as error:
                if (checkpoint / SEAL).exists():  # without a seal the run was killed while saving: nothing to report
                    tqdm.write(f"ssmax: {error}; it is not continued", file=sys.stderr)
                shutil.rmtree(checkpoint)
    state.wait_for_everyone()
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), default=None)
