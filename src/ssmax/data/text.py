"""Bytes to text: encodings, files that are not text, and a count of what was left out. No torch."""

import bz2
import codecs
import errno
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

HEAD = 2**20  # characters at a file's beginning by which its kind is decided
SHOWN = 3  # places shown in one line
BAD_BYTES, UNREADABLE = "bytes that are not UTF-8", "files that cannot be read to their end"
# UTF-32 comes before UTF-16, since its mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# A byte that cannot be decoded becomes a lone surrogate, which never occurs in decoded text.
BAD = re.compile("[\ud800-\udfff]")
MARK = "ssmax-mark"
codecs.register_error(MARK, lambda e: ("".join(chr(0xDC00 + byte) for byte in e.object[e.start : e.end]), e.end))  # pyrefly: ignore


class Account:
    """Counts what was left out of a corpus: for each kind the number, and the first places.

    Attributes:
        found: [count, places] of each kind, a JSON value.
    """

    def __init__(self) -> None:
        self.found: dict[str, list[Any]] = {}

    def add(self, kind: str, place: str, count: int = 1) -> None:
        """Add what was left out at a place."""
        entry = self.found.setdefault(kind, [0, []])
        entry[0] += count
        if len(entry[1]) < SHOWN and place.partition(", ")[0] not in {known.partition(", ")[0] for known in entry[1]}:
            entry[1].append(place)

    def lines(self) -> list[str]:
        """Return one line for each kind."""
        return [
            f"{kind}: {count:,} ({'; '.join(places)}{' ...' * (count > len(places) == SHOWN)})"
            for kind, (count, places) in self.found.items()
        ]


class Damage(Exception):
    """A file cannot be read any further, and reading it again does not help. The message is the reason."""


@contextmanager
def damage(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of readers about a damaged or locked file, and errors of the given kinds, into Damage."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, *kinds) as error:
        raise Damage(_first_line(error)) from error
    except OSError as error:
        if error.errno not in (None, errno.EACCES):  # the disk's own errors have other numbers, readers' have none
            raise
        raise Damage(error.strerror or _first_line(error)) from error


def _first_line(error):
    return str(error).partition("\n")[0]


def _zstd(path):
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd"))


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


def opened(path: Path) -> Any:
    """Open a file for its bytes, decompressed."""
    return COMPRESSED.get(path.suffix.lower(), lambda p: open(p, "rb"))(path)


@contextmanager
def opened_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file as text: by its byte order mark, else as UTF-8. Bytes that cannot be decoded are marked; see cleaned."""
    with opened(path) as file:
        encoding = _encoding(file.peek(4)[:4])
        yield io.TextIOWrapper(file, encoding=encoding, errors=MARK, newline=newline)


def _encoding(head: bytes) -> str:
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")


def decoded(value: bytes) -> str:
    """Return the text of bytes, decoded like a file."""
    return value.decode(_encoding(value[:4]), errors=MARK)


def cleaned(text: str) -> tuple[str, int]:
    """Return text without the bytes that could not be decoded, and the number of bytes left out.

    If more than one character in a hundred of a line is bad, the whole line is left out, since it
    has another encoding. Of other lines only the bad bytes are left out.
    """
    if text.isascii() or BAD.search(text) is None:
        return text, 0
    kept, lost = [], 0
    for line in text.splitlines(keepends=True):
        rest, bad = BAD.subn("", line)
        if 100 * bad > len(line):
            lost += len(rest.encode()) + bad
        else:
            kept.append(rest)
            lost += bad
    return "".join(kept), lost


def refusal(path: Path) -> str | None:
    """Return the kind of a file that is not text, by its beginning; None for text."""
    with opened_text(path) as file:
        head, wide = file.read(HEAD), file.encoding not in ("utf-8", "utf-8-sig")
    strange = len(BAD.findall(head)) + head.count("\0") + wide * head.count("\ufeff")
    if 100 * strange > len(head) and ("\0" in head or wide):
        return "files that are binary"
    if 2 * len(cleaned(head)[0]) < len(head):
        return "files of another encoding than UTF-8"
    return None


def pieces(path: Path, piece: int, name: str, account: Account) -> Iterator[str]:
    """Yield a file's text in pieces of `piece` characters, each up to the end of a line; -1: the whole text at once."""
    try:
        with damage():
            yield from _pieces(path, piece, account, name)
    except Damage as error:
        account.add(UNREADABLE, f"{name}, {error}")


def _pieces(path, piece, account, name):
    if kind := refusal(path):
        account.add(kind, name)
        return
    with opened_text(path) as file:
        known = False
        while marked := file.read(piece) + file.readline(piece):
            text, lost = cleaned(marked)
            if lost:
                account.add(BAD_BYTES, name if known else f"{name}, the first at byte {_first_bad(path):,}", lost)
                known = True
            if text.strip():
                yield text


def _first_bad(path: Path) -> int:
    """Return the offset of the first byte that cannot be decoded."""
    read = 0
    with opened(path) as file:
        encoding = _encoding(file.peek(4)[:4]).removesuffix("-sig")
        decoder = codecs.getincrementaldecoder(encoding)()
        while True:
            block = file.read(HEAD)
            read += len(block)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return read - len(error.object) + error.start
            if not block:
                return read
