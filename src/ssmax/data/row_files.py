"""Rows of text in files: parquet, arrow, JSON, CSV and TSV, also compressed; and which column is the text. No torch."""

import csv
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ssmax.data.text import (
    BAD_BYTES,
    COMPRESSED,
    UNREADABLE,
    Account,
    Damage,
    cleaned,
    damage,
    decoded,
    opened,
    opened_text,
    refusal,
)
from ssmax.errors import UserError

NAMED = ("text", "content")
LOOK, LOOK_LONGEST = 1000, 100_000  # rows by which the column is chosen; at most so many if none of them shows one
# Limit of a field of a CSV file, so that a quote that is never closed does not take the rest of the file.
LONGEST_FIELD = 2**24
Say = Callable[..., None]  # reports what was left out: its kind, its place in the file, and its number
Row = dict[str, Any]


def is_rows(path: Path) -> bool:
    """Return whether a file's name is that of a file of rows."""
    return _suffix(path) in READERS


def texts(path: Path, column: str, name: str, account: Account) -> Iterator[str]:
    """Yield the column of each row that has it as text. The account records what is left out.

    Raises:
        OSError: the file cannot be opened or its disk fails.
    """

    def say(kind: str, place: str, count: int = 1) -> None:
        account.add(kind, f"{name}, {place}" if place else name, count)

    try:
        for place, row in _read(path, column, say):
            text = text_of(row.get(column), column, place, say)
            if text is not None and text.strip():
                yield text
    except Damage as error:
        say(UNREADABLE, str(error))


def text_of(value: Any, column: str, place: str, say: Callable[..., None]) -> str | None:
    """Return a value as text, or None if it is not text, which is reported."""
    if value is None:
        say(f"rows without {column!r}", place)
        return None
    text = decoded(value) if isinstance(value, bytes) else value
    if not isinstance(text, str) or (isinstance(value, bytes) and "\0" in text):
        say(f"rows whose {column!r} is not text", f"{place}: {_kind(value)}")
        return None
    text, lost = cleaned(text)
    if lost:
        say(BAD_BYTES, place, lost)
    return text


def column_of_files(paths: list[Path], wanted: str | None, source: str, *, named: bool = False) -> str:
    """Return the column of text in files of rows, from the first file that has one.

    Args:
        paths: paths of the files.
        wanted: the column's name; None to look for one.
        source: name of the corpus, for messages.
        named: accept only columns named text or content, not a column that is the only one of text.

    Raises:
        UserError: no file has such a column. The message is about the first file that has rows.
    """
    first: UserError | None = None
    seen = Account()
    for path in paths:
        untyped = _suffix(path) in (".csv", ".tsv")
        read = _read(path, wanted, lambda kind, place, path=path, **_: seen.add(kind, _at(path, place)))
        try:
            column = choose_column((row for _, row in read), wanted, source, path.name, untyped=untyped, named=named)
        except UserError as error:
            first = first or error
        except Damage as error:
            seen.add(UNREADABLE, _at(path, str(error)))
        else:
            if column is not None:
                return column
    what = "; ".join(seen.lines())
    raise first or UserError(f"corpus {source!r} holds no rows{f'; left out {what}' if what else ''}")


def choose_column(
    rows: Iterator[Row], wanted: str | None, source: str, place: str = "", *, untyped: bool = False, named: bool = False
) -> str | None:
    """Return the column of text, by the first rows: wanted, else text, else content, else the only one that holds text.

    Returns:
        The column's name; None if there are no rows.

    Raises:
        UserError: no such column, or it holds something other than text.
    """
    kinds: dict[str, set[str]] = defaultdict(set)
    count = 0
    for count, row in enumerate(itertools.islice(rows, LOOK_LONGEST), 1):
        for name, value in row.items():
            kinds[name] |= {_kind(value, untyped)} - {""}
        if "text" in kinds.get(wanted or "text", ()) or (count >= LOOK and _candidate(kinds, wanted, named)):
            break
    if not count:
        return None
    where = f" in {place}" if place not in ("", source, Path(source).name) else ""
    chosen = _candidate(kinds, wanted, named) or wanted
    if chosen is None:
        columns = ", ".join(name + (f" ({'/'.join(sorted(found))})" if found else "") for name, found in kinds.items())
        raise UserError(f"data set {source!r} has no column 'text'{where}, but {columns}; name one as {source}#COLUMN")
    if chosen not in kinds:
        raise UserError(f"data set {source!r} has no column {chosen!r}{where}, but {', '.join(kinds)}")
    if kinds[chosen] and "text" not in kinds[chosen]:
        raise UserError(
            f"data set {source!r}: the column {chosen!r}{where} holds {' and '.join(sorted(kinds[chosen]))}, not text; name "
            f"another as {source}#COLUMN, or write the text of each row into one"
        )
    return chosen


def _candidate(kinds: dict[str, set[str]], wanted: str | None, named: bool) -> str | None:
    """Return the column to use, among those seen so far, or None."""
    for name in (wanted,) if wanted else NAMED:
        if name in kinds:
            return name
    only = [] if named or wanted else [name for name, found in kinds.items() if found == {"text"}]
    return only[0] if len(only) == 1 else None


def _kind(value: Any, untyped: bool = False) -> str:
    """Return the kind of a value as a plural noun; empty for a missing value."""
    if value is None or value == "":
        return ""
    if isinstance(value, bytes):
        return "bytes that are not text" if "\0" in decoded(value) else "text"
    if isinstance(value, str):
        return "numbers" if untyped and _is_number(value) else "text"
    kinds = ((bool, "truth values"), ((int, float), "numbers"), (list, "lists"), (dict, "objects"))
    return next((name for kind, name in kinds if isinstance(value, kind)), f"{type(value).__name__} values")


def _is_number(value: str) -> bool:
    try:
        return value.strip().lower() in ("true", "false") or float(value) is not None
    except ValueError:
        return False


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _at(path: Path, place: str) -> str:
    return f"{path.name}, {place}" if place else path.name


def _read(path: Path, column: str | None, say: Say) -> Iterator[tuple[str, Row]]:
    """Yield the place and the content of each row of a file."""
    import pyarrow as pa

    reader, binary = READERS[_suffix(path)]
    with damage(pa.ArrowException):
        if path.stat().st_size == 0:
            return
        if not binary and (kind := refusal(path)):
            say(kind, "")
            return
        yield from reader(path, column, say)


def _parquet(path, column, say):
    import pyarrow.parquet as pq

    with pq.ParquetFile(_source(path)) as file:
        only = [column] if column in file.schema_arrow.names else None
        yield from _of_batches(file.iter_batches(batch_size=64, columns=only))


def _arrow(path, column, say):
    import pyarrow as pa

    source = _source(path)
    try:
        file = pa.ipc.open_file(source)
        batches = (file.get_batch(i) for i in range(file.num_record_batches))
    except pa.ArrowInvalid:
        batches = pa.ipc.open_stream(_source(path))
    yield from _of_batches(batch.select([column]) if column in batch.schema.names else batch for batch in batches)


def _source(path):
    """Return a file that Arrow can seek in: mapped, or decompressed in memory."""
    import pyarrow as pa

    if path.suffix.lower() not in COMPRESSED:
        return pa.memory_map(str(path))
    with opened(path) as file:
        return pa.BufferReader(file.read())


def _of_batches(batches):
    count = itertools.count(1)
    for batch in batches:
        for row in batch.to_pylist():
            yield f"row {next(count):,}", row


def _csv(path, column, say):
    csv.field_size_limit(LONGEST_FIELD)
    with opened_text(path, newline="") as file:
        head = file.readline()
        delimiter = "\t" if _suffix(path) == ".tsv" else max(",;\t", key=head.count)
        lines = csv.reader(itertools.chain([head], file), delimiter=delimiter, strict=True)
        names: list[str] = []
        while True:
            at = f"line {lines.line_num + 1:,}"
            try:
                fields = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                say("rows that are broken", f"{at}: {error}")
                continue
            if not names:
                names = fields
            elif fields and len(fields) != len(names):
                say("rows with more or fewer fields than the first", at)
            elif fields:
                yield at, dict(zip(names, fields, strict=True))


def _json(path, column, say):
    """Yield rows of JSON lines, an array of rows, an object with an array, or one row; the file's content shows which."""
    with opened_text(path, newline="\n") as file:
        first = list(itertools.islice((line for line in file if line.strip()), 2))
    if not first:
        return
    alone = len(first) == 1 and _suffix(path) == ".json"
    if not (alone or _goes_on(first[0])):
        yield from _json_lines(path, say)
        return
    try:
        with opened_text(path) as file:
            whole = json.load(file)
    except (ValueError, RecursionError) as error:
        if isinstance(_parsed(first[-1]), dict):  # lines, of which the first is broken
            yield from _json_lines(path, say)
            return
        raise Damage(f"not JSON: {error}") from error
    for number, row in enumerate(_rows_of(whole, column, say), 1):
        if isinstance(row, dict | str):
            yield f"row {number:,}", _as_row(row)
        else:
            say("rows that are not objects", f"row {number:,}")


def _json_lines(path, say):
    with opened_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _parsed(line)
            if isinstance(row, dict | str):
                yield f"line {number:,}", _as_row(row)
            else:
                say("lines that are not JSON objects", f"line {number:,}")


def _goes_on(line):
    """Return whether a first line is an array, or begins an object that ends on a later line."""
    line = line.strip()
    try:
        return isinstance(json.loads(line), list)
    except json.JSONDecodeError as error:
        return line.startswith("[") or (error.pos >= len(line) and not error.msg.startswith("Unterminated"))
    except RecursionError:
        return False


def _rows_of(whole, column, say):
    """Return the rows of a JSON file that holds an array, an object with an array, or one row."""
    if isinstance(whole, dict):
        if any(isinstance(whole.get(name), str) for name in ([column] if column else NAMED)):
            return [whole]
        arrays = {k: v for k, v in whole.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)}
        whole = next((arrays[k] for k in ("data", "train", "rows") if k in arrays), None)
        if whole is None and len(arrays) == 1:
            [whole] = arrays.values()
    if not isinstance(whole, list):
        say("JSON files without rows", "")
        return []
    return whole


def _as_row(row):
    return {"text": row} if isinstance(row, str) else row


def _parsed(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


READERS = {
    ".parquet": (_parquet, True),
    ".arrow": (_arrow, True),
    ".feather": (_arrow, True),
    ".jsonl": (_json, False),
    ".ndjson": (_json, False),
    ".json": (_json, False),
    ".csv": (_csv, False),
    ".tsv": (_csv, False),
}
SUFFIXES = frozenset(READERS)
