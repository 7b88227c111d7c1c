"""Files and folders that are written whole or not at all, and checked for changes when they are read. No torch."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssmax.errors import Damaged, UserError

SEAL = "seal.json"


def check_destination(path: Path, *, new: bool = False, file: bool = False) -> None:
    """Raise UserError if a path cannot be written. Call it before the work whose result the path will hold.

    Args:
        path: a file or folder; its parents need not exist.
        new: raise also if the path exists.
        file: raise also if the path is a folder.
    """
    if new and os.path.lexists(path):
        raise UserError(f"{path} exists already; give a new {'folder' if path.is_dir() else 'file'}")
    sealed = next((parent for parent in path.resolve().parents if new and (parent / SEAL).exists()), None)
    if sealed:
        raise UserError(
            f"{path} cannot be written: {sealed} is a finished folder, which {SEAL} describes; give a place outside of it"
        )
    if file and path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir():
        raise UserError(f"{path} cannot be written: {place} is not a directory")
    if not os.access(place, os.W_OK):
        raise UserError(f"{path} cannot be written: no permission to write in {place}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, sync it and rename it. A reader sees either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_whole(folder: Path, owner: str | None = None, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to write in. At the end sync it and rename it to folder, which replaces an older one.

    Args:
        folder: the folder to write. If the block raises, an older one stays as it was.
        owner: seal the folder with this owner's name; see check_folder.
        new: replace nothing. UserError is raised if the folder, or a file of that name, appeared in the
            meantime.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if owner is not None:
            seal_folder(temporary, owner)
        else:
            _sync_all(temporary)
        if new:
            rename_new(temporary, folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rename_new(temporary: Path, path: Path) -> None:
    """Rename a file or folder to a path that nothing has. Raise UserError, and replace nothing, if that appeared in the meantime."""
    try:
        if temporary.is_dir():
            path.mkdir()
        else:
            path.touch(exist_ok=False)
    except FileExistsError:
        raise UserError(
            f"{path} was created by something else in the meantime and was not replaced; nothing was written. Give a new path"
        ) from None
    temporary.replace(path)


def seal_folder(folder: Path, owner: str) -> None:
    """Sync all files of a folder, then write seal.json with the owner and the SHA-256 of each file."""
    _sync_all(folder)
    write_atomically(folder / SEAL, json.dumps({"owner": owner, "files": _hashes(folder)}, indent=1) + "\n")


def check_folder(folder: Path, owner: str | None = None) -> None:
    """Raise Damaged, with the file's name, if a folder has changed since it was sealed, has no seal, or has another owner."""
    try:
        seal = json.loads((folder / SEAL).read_bytes())
        wanted, whose = {name: sha for name, sha in dict(seal["files"]).items() if _counts(name)}, seal["owner"]
    except FileNotFoundError:
        raise Damaged(f"{folder} has no {SEAL}; it was not written completely") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{folder / SEAL} is damaged") from None
    if owner is not None and whose != owner:
        raise Damaged(f"{folder} belongs to {whose}, not to {owner}")
    found = _hashes(folder)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            state = "missing" if name not in found else "not listed" if name not in wanted else "damaged or changed"
            raise Damaged(f"{folder / name} is {state}; it does not match {SEAL}")


def write_checked(path: Path, content: str) -> None:
    """Write a file, and beside it PATH.sha256 with its SHA-256, which sha256sum -c can read."""
    # The sum is written first: a sum without its file is harmless, but a file with an older sum would count as damaged.
    write_atomically(_sum_file(path), f"{hashlib.sha256(content.encode()).hexdigest()}  {path.name}\n")
    write_atomically(path, content)


def check_file(path: Path) -> bool:
    """Raise Damaged if a file does not match its PATH.sha256, and return whether there is one to check it by."""
    try:
        wanted = _sum_file(path).read_bytes()
    except FileNotFoundError:
        return False
    if wanted != f"{sha256(path)}  {path.name}\n".encode():
        raise Damaged(f"{path} is damaged: it does not match {_sum_file(path).name}; delete it to make it again")
    return True


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_file(path):
    return path.with_name(f"{path.name}.sha256")


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL and p.suffix != ".tmp")


def _counts(name):
    """Whether a seal covers a file. A hub adds hidden files to what it stores, and people edit the model card."""
    return name != "README.md" and not any(part.startswith(".") for part in Path(name).parts)


def _hashes(folder):
    names = {str(path.relative_to(folder)): path for path in _files(folder)}
    return {name: sha256(path) for name, path in names.items() if _counts(name)}


def _sync_all(folder):
    for path in [*_files(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _sync(path)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
