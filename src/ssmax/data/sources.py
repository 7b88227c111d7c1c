"""The documents of a corpus: text files, or rows on disk or on a hub; one source, or several mixed by weight. No torch."""

import copy
import functools
import hashlib
import itertools
import math
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssmax.data import row_files
from ssmax.data.corpus_files import declared_files, find_corpus, is_saved, name_in, visible_files
from ssmax.data.text import COMPRESSED, Account, pieces
from ssmax.errors import LeftOut, RunFailed, UserError
from ssmax.runs.hub import cached_only_offline, is_hub_name, may_pass, reason
from ssmax.runs.progress import progress_bar

SPELLING = "NAME[:SUBSET][#COLUMN][=WEIGHT], several with commas, such as books=0.3,org/web:en#body=0.7"
# Version of the way in which files are read. If that changes, corpora that were prepared before are not reused.
READING = 2
# Tests of the standard library are repetitive, and not every Python ships them.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
READERS = {"text", "arrow", "parquet", "json", "csv"}  # names of readers of datasets, which are not data sets on a hub
# Names with these endings are meant as files. Names on a hub may contain other dots.
FILES = {".txt", ".md", ".py", *row_files.SUFFIXES, *COMPRESSED}
# A large text file is read in pieces of this size, each a document, if it need not be held whole.
PIECE = 2**20


@dataclass(frozen=True)
class _Part:
    """One source of a mixture, as the user spelled it."""

    name: str
    subset: str | None
    column: str | None
    weight: float

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()


class Documents:
    """An iterator over the documents of a corpus, whose position can be saved and restored.

    With several sources, the next document comes from the source that is furthest below its share
    of the text. Nothing is random, and the shares hold at any point. The mixture ends when its
    first source ends. What cannot be read is left out and counted; at the end, a LeftOut warning
    for each kind says how much and where.

    Args:
        source: None for Python's own standard library without its tests; or SPELLING. Each NAME is
            a text file, a folder of text files, a file of rows (see ssmax.data.row_files) or a
            folder of them, a folder that save_to_disk of datasets wrote, or a data set on a hub.
            Without #COLUMN the text is the column text, content, or the only column that holds
            text.
        piece: characters of a text file in one document; -1 for a whole file.

    Raises:
        UserError: a source does not exist, or cannot be read.
    """

    def __init__(self, source: str | None, piece: int = PIECE):
        if source is None:
            self.parts = [_Part("", None, None, 1.0)]
            self.name = "Python's standard library"
            root = Path(sysconfig.get_paths()["stdlib"])
            self.sources: list[Any] = [_text_files(root, _standard_library(root), piece, Account())]
        else:
            self.parts = _parse(source)
            alone = self.parts[0].path if len(self.parts) == 1 else None
            self.name = alone.resolve().name if alone is not None and alone.exists() else source
            self.sources = [_open(part, piece) for part in self.parts]
        self.bytes_read = [0] * len(self.parts)

    def __iter__(self) -> Iterator[str]:
        """Yield texts from the present position. A later iteration continues where an earlier one stopped."""
        yield from self.read()
        warn_left_out(self.name, self.left_out())

    def read(self) -> Iterator[str]:
        """Yield texts like iteration, but without a warning; the caller reports left_out."""
        iterators = [iter(source) for source in self.sources]
        while True:
            behind = [read / part.weight for read, part in zip(self.bytes_read, self.parts, strict=True)]
            chosen = behind.index(min(behind))
            text = next(iterators[chosen], None)
            if text is None:
                return
            self.bytes_read[chosen] += len(text.encode())
            yield text

    def left_out(self) -> list[str]:
        """Return what was left out so far, one line for each kind."""
        return [line for source in self.sources for line in source.account.lines()]

    def in_memory(self, limit_bytes: int) -> list[str]:
        """Return the next documents, at most limit_bytes of text, and warn of what was left out.

        Raises:
            UserError: there is no text.
        """
        texts = []
        with progress_bar(limit_bytes, "reading corpus", unit="B at most", delay=3) as bar:
            for text in self.read():
                texts.append(text)
                total = sum(self.bytes_read)
                bar.update(total - bar.n)
                if total >= limit_bytes:
                    break
        if not texts:
            raise self.without_text()
        warn_left_out(self.name, self.left_out())
        return texts

    def without_text(self) -> UserError:
        """Return the error for a corpus without text, with the reason."""
        why = f"; left out {'; '.join(lines)}" if (lines := self.left_out()) else ""
        return UserError(
            f"corpus {self.name!r} holds no text{why}; give UTF-8 text files or a data set with a column 'text'"
        )

    def state(self) -> dict[str, Any]:
        """Return the position after the last document, as a JSON value."""
        return {"bytes": list(self.bytes_read), "sources": [copy.deepcopy(source.state()) for source in self.sources]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position that state returned for the same sources."""
        self.bytes_read = list(state["bytes"])
        for source, at in zip(self.sources, copy.deepcopy(state["sources"]), strict=True):
            source.restore(at)

    def identity(self) -> list[Any]:
        """Return what identifies these documents: the spelling, and the name, size and modification time of each file."""
        return [[part.name, part.subset, part.column, part.weight, _stamp(part)] for part in self.parts]


def documents(source: str | None, limit_bytes: int) -> tuple[list[str], str]:
    """Read whole documents into memory, at most limit_bytes of text, and return them with the source's name.

    Source, warnings and errors are those of Documents.
    """
    stream = Documents(source, piece=-1)
    return stream.in_memory(limit_bytes), stream.name


def warn_left_out(name: str, lines: list[str]) -> None:
    """Warn of what was left out of a corpus, once for each kind."""
    for line in lines:
        warnings.warn(f"corpus {name!r}: left out {line}", LeftOut, stacklevel=4)


class _Files:
    """Documents of files, each with its reader. The position is a file, and a number of documents in it."""

    def __init__(self, readers, account):
        self.readers, self.account = readers, account
        self.file, self.done = 0, 0
        self.before = copy.deepcopy(account.found)  # the account before the present file, which may be read again

    def __iter__(self):
        while self.file < len(self.readers):
            self.account.found = copy.deepcopy(self.before)
            for text in itertools.islice(self.readers[self.file](self.account), self.done, None):
                self.done += 1
                yield text
            self.file, self.done = self.file + 1, 0
            self.before = copy.deepcopy(self.account.found)

    def state(self):
        return [self.file, self.done, self.before]

    def restore(self, state):
        self.file, self.done, self.before = state


class _Rows:
    """Rows that the library datasets reads, saved on disk or on a hub."""

    def __init__(self, part, data):
        self.part, self.account = part, Account()
        column = row_files.choose_column(data.take(row_files.LOOK), part.column, part.name)
        if column is None:
            raise UserError(f"data set {part.name!r} holds no rows")
        self.column = column
        self.data = data.select_columns([self.column])
        self.count = 0

    def __iter__(self):
        try:
            for row in self.data:
                self.count += 1
                text = row_files.text_of(row[self.column], self.column, f"row {self.count:,}", self.account.add)
                if text is not None and text.strip():
                    yield text
        except Exception as error:  # readers and the hub's client raise many kinds of errors; the user needs one line
            failed = f"reading {self.part.name} failed: {reason(error)}"
            if may_pass(error):
                raise RunFailed(f"{failed}; the same command continues") from error
            raise UserError(failed) from error

    def state(self):
        return {"data": self.data.state_dict(), "count": self.count, "left_out": self.account.found}

    def restore(self, state):
        if "data" not in state:  # of an earlier version
            state = {"data": state, "count": 0, "left_out": {}}
        self.data.load_state_dict(state["data"])
        self.count, self.account.found = state["count"], state["left_out"]


def _parse(source):
    """Parse a spelling into its sources. A name that exists is a path, whatever characters it has."""
    if Path(source).expanduser().exists():
        return [_Part(source, None, None, 1.0)]
    found = [_part(text) for text in source.split(",")]
    weights = [part.weight for part in found if part.weight]
    if 0 < len(weights) < len(found):
        raise UserError(
            f"corpus {source!r} gives weights to some sources only; give all of them a weight, or none; {SPELLING}"
        )
    return found if weights else [replace(part, weight=1.0) for part in found]


def _part(text):
    """Return one source of a spelling, with weight 0 if none is given."""
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
            raise UserError(f"corpus {text!r}: the weight after = must be a positive number; {SPELLING}")
    if name and Path(name).expanduser().exists():
        return _Part(name, None, None, weight)
    match = re.fullmatch(r"([^:#]+)(?::([^:#]+))?(?:#([^#]+))?", name)
    if match is None:
        raise UserError(f"corpus {text!r} is not spelled {SPELLING}")
    return _Part(match[1], match[2], match[3], weight)


def _open(part, piece):
    path = part.path
    if not path.exists() and (
        not is_hub_name(part.name) or Path(part.name).suffix.lower() in FILES or part.name in READERS
    ):
        raise UserError(f"corpus {part.name!r} does not exist; give a text file, a folder, or the name of a data set")
    try:
        if path.exists() and not is_saved(path):
            return _open_files(part, piece)
        return _Rows(part, _one_split(part, _load(part)))
    except UserError:
        raise
    except Exception as error:  # datasets and the hub's client raise various errors; the user needs one line
        if isinstance(error, OSError) and path.exists():
            raise
        what = "" if path.exists() else " is not a file or folder on this machine, and"
        raise UserError(f"corpus {part.name!r}{what} could not be loaded as a data set: {reason(error)}") from error


def _open_files(part, piece):
    path, account = part.path, Account()
    if path.is_dir():
        declared = declared_files(path, part.subset)
        found = visible_files(path) if declared is None else declared
        found, column = find_corpus(path, found, part.column, account)
    else:
        path, found = path.parent, [path]
        column = row_files.column_of_files(found, part.column, part.name) if row_files.is_rows(found[0]) else None
    if column is not None:
        return _Files([functools.partial(row_files.texts, p, column, name_in(path, p)) for p in found], account)
    if part.subset or part.column:
        raise UserError(f"corpus {part.name!r} is text without subsets and columns; leave out : and #")
    return _text_files(path, found, piece, account)


def _text_files(folder, paths, piece, account):
    return _Files([functools.partial(pieces, p, piece, name_in(folder, p)) for p in paths], account)


def _load(part):
    import datasets

    datasets.disable_progress_bars()
    if part.path.exists():
        return datasets.load_from_disk(str(part.path))
    cached_only_offline()
    return datasets.load_dataset(part.name, part.subset, streaming=True)


def _one_split(part, found):
    if isinstance(found, dict):
        if "train" not in found and len(found) > 1:
            raise UserError(f"data set {part.name!r} has no split 'train', but {', '.join(found)}")
        found = found["train"] if "train" in found else next(iter(found.values()))
    return found.to_iterable_dataset() if hasattr(found, "to_iterable_dataset") else found


def _standard_library(root):
    return sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))


def _stamp(part):
    """Return a hash of the names, sizes and times of a local source's files; None for a source that is not local."""
    path = part.path
    if not part.name or not path.exists():
        return None
    digest = hashlib.sha256(f"{READING}\n".encode())
    for file in visible_files(path) if path.is_dir() else [path]:
        status = file.stat()
        digest.update(f"{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
