"""Tokens on disk: shards of equal size with a manifest. They are written whole, and mapped instead of loaded. No torch."""

import fcntl
import hashlib
import io
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ssmax.errors import UserError
from ssmax.runs.files import sha256, write_atomically
from ssmax.runs.progress import progress_bar

SHARD_TOKENS = 2**28  # 512 MiB of 16-bit tokens
VERSION = 1
MANIFEST, HELD_OUT = "manifest.json", "held-out.npy"


@dataclass
class Manifest:
    """The content of a folder of shards.

    Attributes:
        source: name of the corpus.
        tokenizer: its name as given, end (id of the end-of-text token), vocabulary, and sha256 of
            its tokenizer.json.
        dtype: dtype of the shards, little-endian.
        documents: number of documents read.
        bytes: bytes of text read.
        tokens: number of training tokens written.
        shards: name, tokens and sha256 of each shard.
        held_out: number of held-out texts, their length in tokens, and sha256 of their file.
        left_out: what was left out of the text, one line for each kind.
        fingerprint: hash of all tokens; empty until the preparation is finished.
        resume: position at which an unfinished preparation continues.
    """

    source: str
    tokenizer: dict[str, Any]
    dtype: str
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    held_out: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    fingerprint: str = ""
    resume: dict[str, Any] | None = None
    version: int = VERSION

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Return the manifest of a folder, or None if it has none. Raise UserError if the manifest is damaged."""
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            found = cls(**json.loads(path.read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
            raise UserError(f"{path} is damaged; delete {folder} and prepare it again") from None
        if found.version != VERSION:
            raise UserError(f"{path} is of another version of ssmax; delete {folder} and prepare it again")
        return found

    def write(self, folder: Path, held_out: np.ndarray | None = None) -> None:
        """Write the manifest; if held_out is given, write these texts first."""
        if held_out is not None:
            content = io.BytesIO()
            np.save(content, held_out)
            write_atomically(folder / HELD_OUT, content.getvalue())
            digest = hashlib.sha256(content.getvalue()).hexdigest()
            self.held_out = {"texts": held_out.shape[0], "length": held_out.shape[1], "sha256": digest}
        write_atomically(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")

    def content_hash(self) -> str:
        """Return a hash of all tokens, made from the hashes of the files."""
        parts = [self.tokenizer["sha256"], self.held_out["sha256"], *(shard["sha256"] for shard in self.shards)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


class ShardWriter:
    """Writes tokens into the shard after those in the manifest. A shard gets its final name when it is complete."""

    def __init__(self, folder: Path, manifest: Manifest, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.manifest, self.shard_tokens = folder, manifest, shard_tokens
        self._begin()

    def _begin(self):
        self.name = f"train-{len(self.manifest.shards):05}.bin"
        self.written, self.digest, self.file = 0, hashlib.sha256(), None

    @property
    def full(self) -> bool:
        """Whether the shard has no room left."""
        return self.written == self.shard_tokens

    def add(self, tokens: np.ndarray) -> int:
        """Append as many tokens as the shard has room for, and return their number."""
        tokens = tokens[: self.shard_tokens - self.written]
        if self.file is None:
            self.file = open(self.folder / f".{self.name}.tmp", "wb")  # noqa: SIM115
        content = tokens.astype(self.manifest.dtype).tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.written += len(tokens)
        return len(tokens)

    def finish_shard(self) -> None:
        """Sync the shard, give it its final name and add it to the manifest; the caller writes the manifest."""
        if self.file is None:
            return
        with self.file as file:
            file.flush()
            os.fsync(file.fileno())
        (self.folder / f".{self.name}.tmp").replace(self.folder / self.name)
        entry = {"name": self.name, "tokens": self.written, "sha256": self.digest.hexdigest()}
        self.manifest.shards.append(entry)
        self.manifest.tokens += self.written
        self._begin()


class Shards:
    """The training tokens of a folder as one array of (T,) integers. It has len and slices; only slices are read from disk."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.dtype = folder, manifest.dtype
        self.names = [shard["name"] for shard in manifest.shards]
        self.ends = np.cumsum([0, *(shard["tokens"] for shard in manifest.shards)])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, at: slice) -> np.ndarray:
        start, stop, step = at.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are sliced without a step, got {step}")
        pieces = []
        shard = int(np.searchsorted(self.ends, start, side="right")) - 1
        while start < stop:
            first, end = int(self.ends[shard]), int(self.ends[shard + 1])
            tokens = _mapped(self.folder / self.names[shard], self.dtype)
            pieces.append(tokens[start - first : min(stop, end) - first])
            start, shard = end, shard + 1
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)


@lru_cache(maxsize=256)  # each keeps a file open, and a process may open about a thousand
def _mapped(path, dtype):
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)  # windows are at random places: reading ahead would read 64 times too much
    return np.frombuffer(mapped, dtype)


def token_type(vocabulary: int) -> str:
    """Return the narrower of 16 and 32 bits that holds ids below vocabulary, as a numpy dtype."""
    return "<u2" if vocabulary <= 2**16 else "<u4"


def is_prepared(folder: Path) -> bool:
    """Return whether a preparation was begun in a folder. (manifest.json alone may belong to other data.)"""
    return (folder / MANIFEST).is_file() and (folder / HELD_OUT).is_file()


def check(folder: Path) -> Manifest:
    """Return the manifest of a finished folder, after a quick check that all files exist and have the right size.

    Raises:
        UserError: a file is missing or has another size, or the preparation is not finished.
    """
    manifest = Manifest.read(folder)
    if manifest is None or not manifest.fingerprint:
        raise UserError(f"{folder} holds no finished corpus; prepare it with ssmax prepare")
    for shard in manifest.shards:
        path, size = folder / shard["name"], shard["tokens"] * np.dtype(manifest.dtype).itemsize
        if not path.is_file():
            raise _damaged(path, "is missing")
        if path.stat().st_size != size:
            raise _damaged(path, f"has {path.stat().st_size:,} bytes, not {size:,}")
    if not (folder / HELD_OUT).is_file():
        raise _damaged(folder / HELD_OUT, "is missing")
    return manifest


def verify(folder: Path) -> None:
    """Read all files of a finished folder and compare their hashes with those of the manifest.

    Raises:
        UserError: a file is missing or differs.
    """
    manifest = check(folder)
    files = [(HELD_OUT, manifest.held_out["sha256"]), ("tokenizer/tokenizer.json", manifest.tokenizer["sha256"])]
    files += [(shard["name"], shard["sha256"]) for shard in manifest.shards]
    total = sum((folder / name).stat().st_size for name, _ in files if (folder / name).exists())
    with progress_bar(total, "checking corpus", unit="B", delay=3) as bar:
        for name, wanted in files:
            if not (folder / name).is_file():
                raise _damaged(folder / name, "is missing")
            if sha256(folder / name) != wanted:
                raise _damaged(folder / name, "is not what the manifest says (sha256 differs): damaged or swapped")
            bar.update((folder / name).stat().st_size)


def _damaged(path, what):
    return UserError(f"{path} {what}; delete {path.parent} and prepare it again, or copy that file again")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is being prepared. Another process waits for it, and then finds the folder finished."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
