"""Copies the files of a model other than weights and config: tokenizer, processor, templates, licence."""

import json
import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ssmax.errors import Damaged
from ssmax.hf.loading import load_tokenizer
from ssmax.runs.files import SEAL

WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data"),
    *(".pkl", ".pickle", ".npz", ".npy", ".tflite", ".mlmodel", ".ot", ".nemo", ".distcp", ".index.json"),
)
TOKENIZER = "tokenizer_config.json"
CODE = (".py", ".pyc", ".so", ".ipynb", ".sh")  # not copied: somebody who trusts the new folder might run it


def copy_companions(source: str, target: Path) -> str | None:
    """Copy the files of a model except weights and code. Files that target has already stay as they are.

    Hidden files are not copied either, nor folders with weights (other models), nor links that lead
    out of the folder.

    Args:
        source: a folder, or a name on a hub.
        target: a folder that the model was saved to.

    Returns:
        One line about what was not copied, or None.
    """
    folder = _folder(source)
    if folder is None:
        return f"not copied: tokenizer and other files of {source}, which are neither here nor on the hub"
    behind = []
    for here, folders, names in os.walk(folder):
        where = Path(here)
        for name in sorted(folders):
            inner = where / name
            if name.startswith(".") or inner.is_symlink() or _has_weights(inner):
                folders.remove(name)
                if not name.startswith("."):
                    behind.append(f"{inner.relative_to(folder)}/")
        for name in sorted(names):
            path = where / name
            to = target / path.relative_to(folder)
            if name.startswith(".") or name == SEAL or name.endswith(WEIGHTS) or to.exists():
                continue
            if name.endswith(CODE) or not path.is_file() or not _inside(path, folder):
                behind.append(str(path.relative_to(folder)))
                continue
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
    _name_tokenizer(source, target)
    return f"not copied (code, links out of the folder, other models): {', '.join(sorted(behind))}" if behind else None


def _name_tokenizer(source, target):
    """Write the class of the source's tokenizer into target, since AutoTokenizer may choose it by the model type, which is another one."""
    try:
        kind = type(load_tokenizer(source))
    except Damaged:
        return  # there is none that can be loaded without running code
    path = target / TOKENIZER
    fields = json.loads(path.read_bytes()) if path.is_file() else {}
    named = str(fields.get("tokenizer_class")).removesuffix("Fast")
    # The tokenizers of mistral_common read files of their own, and are not chosen by a class name.
    if named != kind.__name__.removesuffix("Fast") and "mistral_common" not in kind.__module__:
        path.write_text(json.dumps({**fields, "tokenizer_class": kind.__name__}, indent=2, ensure_ascii=False) + "\n")


def _folder(source):
    if Path(source).is_dir():
        return Path(source).resolve()
    try:
        return Path(snapshot_download(source, ignore_patterns=[f"*{end}" for end in WEIGHTS])).resolve()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _has_weights(folder):
    return any(name.endswith(WEIGHTS) for _, _, names in os.walk(folder) for name in names)


def _inside(path, folder):
    """Whether a file really lies in its folder, or, as the hub's cache keeps it, among the blobs of its model."""
    real = path.resolve()
    return real.is_relative_to(folder) or (
        folder.parent.name == "snapshots" and real.is_relative_to(folder.parents[1] / "blobs")
    )
