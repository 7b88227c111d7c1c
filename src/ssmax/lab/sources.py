"""Documents of a corpus: text files, rows on disk or on a hub, one source or several mixed by weight; no torch."""

import copy
import hashlib
import itertools
import math
import os
import re
import socket
import sysconfig
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ssmax.errors import RunFailed, UserError
from ssmax.lab.progress import progress_bar

__all__ = ["Documents", "cached_only_offline", "documents"]

SPELLING = "NAME[:SUBSET][#COLUMN][=WEIGHT], several with commas, such as books=0.3,org/web:en#body=0.7"
# Tests of the standard library repeat themselves and are not shipped with every Python.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
TABLES = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}
COMPRESSED = (".gz", ".zst")
READERS = {"text", "arrow", *TABLES.values()}  # of datasets, under names that would read whatever lies around
# Names that end so are meant as files; other dots are in names on a hub as well.
FILES = {".txt", ".md", ".py", ".json", *TABLES, *COMPRESSED}
# A text file of any size passes in pieces, each a document, where it need not be held whole.
PIECE = 2**20


@dataclass(frozen=True)
class _Part:
    """One source of a mixture, as spelled."""

    name: str
    subset: str | None
    column: str | None
    weight: float

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()


class Documents:
    """The documents of a corpus one after another; where it stands can be kept and restored.

    Of several sources the next document is of the one that is furthest behind its share of the text: nothing is left to
    chance, and the shares hold at any point. The mixture ends with the first source that does.

    Args:
        source: None for Python's own standard library without its tests; or SPELLING, each NAME a text file, a folder of
            text files, a .parquet, .jsonl or .csv file (also .gz, .zst) or a folder of them, a folder that datasets'
            save_to_disk left, or a data set on a hub. Without #COLUMN the text is the column text, content, or the
            only one that holds text.
        piece: characters of a text file that make a document; -1 for a whole file.

    Raises:
        UserError: nothing there, or nothing readable.
    """

    def __init__(self, source: str | None, piece: int = PIECE):
        if source is None:
            self.parts = [_Part("", None, None, 1.0)]
            self.name = "Python's standard library"
            self.sources: list[Any] = [_Files(_standard_library(), piece)]
        else:
            self.parts = _parse(source)
            alone = self.parts[0].path if len(self.parts) == 1 else None
            self.name = alone.name if alone is not None and alone.exists() else source
            self.sources = [_open(part, piece) for part in self.parts]
        self.bytes_read = [0] * len(self.parts)

    def __iter__(self) -> Iterator[str]:
        """Yield texts from where it stands; several iterations continue one another."""
        iterators = [iter(source) for source in self.sources]
        while True:
            behind = [read / part.weight for read, part in zip(self.bytes_read, self.parts, strict=True)]
            chosen = behind.index(min(behind))
            text = next(iterators[chosen], None)
            if text is None:
                return
            self.bytes_read[chosen] += len(text.encode())
            yield text

    def state(self) -> dict[str, Any]:
        """Return where it stands, behind the last document, as JSON can hold it."""
        return {"bytes": list(self.bytes_read), "sources": [copy.deepcopy(source.state()) for source in self.sources]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where state was taken of the same sources."""
        self.bytes_read = list(state["bytes"])
        for source, at in zip(self.sources, state["sources"], strict=True):
            source.restore(at)

    def identity(self) -> list[Any]:
        """Return what names these documents: the spelling, and for files each one's name, size and time of change."""
        return [[part.name, part.subset, part.column, part.weight, _stamp(part)] for part in self.parts]


def documents(source: str | None, limit_bytes: int) -> tuple[list[str], str]:
    """Read whole documents into memory, no more than limit_bytes of text, and describe the source.

    Arguments and errors as Documents.
    """
    stream, texts = Documents(source, piece=-1), []
    with progress_bar(limit_bytes, "reading corpus", unit="B at most", delay=3) as bar:
        for text in stream:
            texts.append(text)
            total = sum(stream.bytes_read)
            bar.update(total - bar.n)
            if total >= limit_bytes:
                break
    if not texts:
        raise UserError(
            f"corpus {stream.name!r} holds no text; give UTF-8 text files or a data set with a column 'text'"
        )
    return texts, stream.name


class _Files:
    def __init__(self, paths, piece):
        self.paths, self.piece = paths, piece
        self.file, self.offset = 0, 0

    def __iter__(self):
        while self.file < len(self.paths):
            try:
                with open(self.paths[self.file], encoding="utf-8") as file:
                    file.seek(self.offset)
                    while text := file.read(self.piece) + file.readline(self.piece):  # to the end of a line
                        self.offset = file.tell()
                        if text.strip():
                            yield text
            except (UnicodeDecodeError, PermissionError):
                pass
            self.file, self.offset = self.file + 1, 0

    def state(self):
        return [self.file, self.offset]

    def restore(self, state):
        self.file, self.offset = state


class _Rows:
    def __init__(self, part, data):
        self.name = part.name
        first = next(iter(data.take(1)), None)
        self.column = _column(part, first) if first is not None else None
        self.data = data if self.column is None else data.select_columns([self.column])

    def __iter__(self):
        if self.column is None:
            return
        try:
            for row in self.data:
                if row[self.column] and row[self.column].strip():
                    yield row[self.column]
        except Exception as error:  # whatever the reader or the hub's client raises, the user needs one line
            raise RunFailed(f"reading {self.name} failed: {_reason(error)}; the same command continues") from error

    def state(self):
        return self.data.state_dict()

    def restore(self, state):
        self.data.load_state_dict(state)


def _parse(source):
    """Sources of a spelling; what exists as it stands is a path, whatever its name."""
    if Path(source).expanduser().exists():
        return [_Part(source, None, None, 1.0)]
    found = [_part(text) for text in source.split(",")]
    weights = [part.weight for part in found if part.weight]
    if 0 < len(weights) < len(found):
        raise UserError(f"corpus {source!r} gives some sources a weight and others none; give all or none; {SPELLING}")
    return found if weights else [replace(part, weight=1.0) for part in found]


def _part(text):
    """One source of a spelling, with weight 0 where none is given."""
    name, sign, given = text.strip().rpartition("=")
    weight = 0.0
    if not sign:
        name = given
    else:
        try:
            weight = float(given)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UserError(f"corpus {text!r}: the weight behind = must be a positive number; {SPELLING}")
    if name and Path(name).expanduser().exists():
        return _Part(name, None, None, weight)
    match = re.fullmatch(r"([^:#]+)(?::([^:#]+))?(?:#([^#]+))?", name)
    if match is None:
        raise UserError(f"corpus {text!r} is not spelled {SPELLING}")
    return _Part(match[1], match[2], match[3], weight)


def _open(part, piece):
    path = part.path
    if (path.is_file() and _table(path) is None) or (path.is_dir() and not _holds_rows(path)):
        if part.subset or part.column:
            raise UserError(f"corpus {part.name!r} is text without subsets and columns; leave out : and #")
        paths = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        return _Files(paths, piece)
    name = part.name
    if not path.exists() and (
        name.startswith((".", "/", "~"))
        or os.sep * 2 in name
        or name.count("/") > 1
        or path.suffix in FILES
        or name in READERS
    ):
        raise UserError(f"corpus {name!r} does not exist; give a text file, a folder, or the name of a data set")
    try:
        return _Rows(part, _one_split(part, _load(part)))
    except UserError:
        raise
    except Exception as error:  # whatever datasets or the hub's client raises, the user needs one line
        what = "" if path.exists() else " is no file or folder here, and"
        raise UserError(f"corpus {name!r}{what} could not be loaded as a data set: {_reason(error)}") from error


def _load(part):
    import datasets

    datasets.disable_progress_bars()
    path = part.path
    if path.is_file():
        return datasets.load_dataset(_table(path) or "", data_files=str(path), streaming=True)
    if _saved(path):
        return datasets.load_from_disk(str(path))
    if path.exists():  # whole, since a bare name such as "parquet" is a reader's
        return datasets.load_dataset(str(path.resolve()), part.subset, streaming=True)
    cached_only_offline()
    return datasets.load_dataset(part.name, part.subset, streaming=True)


def _one_split(part, found):
    if isinstance(found, dict):
        if "train" not in found and len(found) > 1:
            raise UserError(f"data set {part.name!r} has no split 'train', but {', '.join(found)}")
        found = found["train"] if "train" in found else next(iter(found.values()))
    return found.to_iterable_dataset() if hasattr(found, "to_iterable_dataset") else found


def _column(part, row):
    words = [name for name, value in row.items() if isinstance(value, str)]
    if part.column is not None:
        if part.column not in row:
            raise UserError(f"data set {part.name!r} has no column {part.column!r}, but {', '.join(row)}")
        return part.column
    for name in ("text", "content", *(words if len(words) == 1 else [])):
        if name in row:
            return name
    raise UserError(
        f"data set {part.name!r} has no column 'text', but {', '.join(row)}; name one as {part.name}#COLUMN"
    )


def cached_only_offline() -> None:
    """Let the hub's client take what it has cached where there is no network; it would try again for a minute first."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _standard_library():
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))


def _table(path):
    """The reader of a file of rows, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return TABLES.get(suffixes[-1]) if suffixes else None


def _saved(path):
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _holds_rows(folder):
    """Whether a folder holds files of rows and nothing beside them but what describes them."""
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    files = [p for p in files if not any(name.startswith(".") for name in p.parts)]
    tables = [_table(p) is not None for p in files]
    described = [p.suffix.lower() in (".md", ".json") for p in files]
    return _saved(folder) or (any(tables) and all(map(max, zip(tables, described, strict=True))))


def _stamp(part):
    """Hash of the names, sizes and times of a local source's files; None for what is not here."""
    path = part.path
    if not part.name or not path.exists():
        return None
    digest = hashlib.sha256()
    for file in itertools.chain([path], sorted(path.rglob("*"))):
        if file.is_file():
            status = file.stat()
            digest.update(f"{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _reason(error):
    return str(error).splitlines()[0] if str(error) else type(error).__name__
