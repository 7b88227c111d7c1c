"""Text that people have: folders with more than data, changing rows, other encodings, damaged and packed files."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import warnings

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssmax.data import sources
from ssmax.data.sources import Documents, documents
from ssmax.data.text import cleaned
from ssmax.errors import LeftOut, RunFailed, UserError
from ssmax.runs.hub import is_hub_name

# datasets leaves files open that it did not read to the end.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)
PAGES = [f"Page {i} of the text." for i in range(3)]
ROWS = [{"id": i, "text": page} for i, page in enumerate(PAGES)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet(**named):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(named), sink)
    return sink.getvalue().to_pybytes()


def arrow(table, kind):
    sink = pa.BufferOutputStream()
    with kind(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


def written(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def said(call):
    """What a call returns, and what it says was left out."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    assert all(warning.category is LeftOut for warning in found)
    return result, [str(warning.message).partition(": left out ")[2] for warning in found]


def read(source):
    """The documents of a source and what was left out, the same as a stream and in memory."""
    found = said(lambda: documents(str(source), 10**9)[0])
    assert said(lambda: list(Documents(str(source), piece=-1))) == found
    return found


PAGE = {"train.parquet": parquet(text=PAGES)}
LINE = {"train.jsonl": LINES}


@pytest.mark.parametrize(
    "data",
    [PAGE, LINE, {"train.csv": b"id,text\n" + b"".join(b"%d,%s\n" % (i, p.encode()) for i, p in enumerate(PAGES))}],
)
@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ({}, []),
        ({"README.md": "# words", "LICENSE": "words", "stats.txt": "words"}, ["files beside the rows: 3 (LICENSE; README.md; stats.txt)"]),
        ({"_SUCCESS": "", ".gitattributes": "words", "._train.jsonl": b"\0\5", ".DS_Store": b"\0", ".git/a.jsonl": LINES}, []),
        ({f"{i}.txt": "words" for i in range(9)}, ["files beside the rows: 9 (0.txt; 1.txt; 2.txt ...)"]),
        ({"dataset_infos.json": '{"default": {"features": {}}}'}, ["JSON files without rows: 1 (dataset_infos.json)"]),
        ({"test.jsonl": LINES, "validation/0.jsonl": LINES}, ["files of other splits than train: 2 (test.jsonl; validation/0.jsonl)"]),
    ],
)  # fmt: skip
def test_a_folder_of_rows_gives_its_rows_and_names_the_rest(data, beside, named, tmp_path):
    assert read(written(tmp_path, data | beside)) == (PAGES, named)


def test_kinds_of_rows_can_be_mixed(tmp_path):
    files = {"a.parquet": parquet(text=PAGES), "b.jsonl": LINES, "c/d.tsv.gz": gzip.compress(b"text\tid\nA page.\t4\n")}
    assert read(written(tmp_path, files)) == ([*PAGES, *PAGES, "A page."], [])


def test_a_folder_of_text_stays_text(tmp_path):
    files = {
        "README.md": "readme", "a.txt": "a", "b.py": "b", "config.json": '{"name": "x"}', "c.txt.gz": gzip.compress(b"c"),
        "books.csv": "number,title\n1,One\n2,Two\n", "d.png": b"\x89PNG\0\0\xff", ".e.txt.swp": "e", ".git/config": "e",
    }  # fmt: skip
    named = ["files of rows without a column 'text' beside text: 1 (books.csv)", "files that are binary: 1 (d.png)"]
    assert read(written(tmp_path, files)) == (["readme", "a", "b", "c", '{"name": "x"}'], named)
    with pytest.raises(UserError, match=r"no column 'body' in books.csv, but number, title"):
        Documents(f"{tmp_path}#body")


def test_a_licence_is_no_corpus_where_the_rows_have_no_text(tmp_path):
    written(tmp_path, {"a.csv": "number,title,name\n1,One,A\n", "LICENSE": "words", "README.md": "words"})
    with pytest.raises(
        UserError, match=r"no column 'text' in a.csv, but number \(numbers\), title \(text\), name \(text\)"
    ):
        Documents(str(tmp_path))


CHANGING = {
    "null, then a string": [{"text": p, "url": None} for p in PAGES] * 4000 + [{"text": "A page.", "url": "x"}],
    "a number, then a string": [{"id": 1, "text": PAGES[0]}, {"id": "two", "text": PAGES[1]}],
    "fields come and go": [{"text": PAGES[0]}, {"meta": {"a": []}, "text": PAGES[1]}, {"text": PAGES[2], "b": [1]}],
    "objects, lists, null": [{"meta": meta, "text": PAGES[0]} for meta in ({"a": 1}, [1], None, {"b": {}}, "x")],
}


@pytest.mark.parametrize("changing", CHANGING)
@pytest.mark.parametrize("files", [1, 2])
def test_only_the_text_of_rows_matters(changing, files, tmp_path, record):
    rows = CHANGING[changing]
    for i in range(files):
        part = rows[i * len(rows) // files : (i + 1) * len(rows) // files]
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    assert read(tmp_path) == ([row["text"] for row in rows], [])
    record("rows whose other fields change", 1)


def test_rows_that_are_no_text_are_named(tmp_path):
    rows = [
        '{"id": 1}',
        '{"text": null}',
        '{"text": "A page."}',
        "{broken",
        '{"text": 5}',
        '{"text": ["x"]}',
        "",
        "7",
        '{"text": ""}',
    ]
    file = written(tmp_path, {"a.jsonl": "\n".join(rows)}) / "a.jsonl"
    assert read(file) == (
        ["A page."],
        [
            "rows without 'text': 2 (a.jsonl, line 1)",
            "lines that are not JSON objects: 2 (a.jsonl, line 4)",
            "rows whose 'text' is not text: 2 (a.jsonl, line 5: numbers)",
        ],
    )


@pytest.mark.parametrize("first", ['{"id": 1}', '{"text": null}', '{"id": 1, "text": ""}'])
def test_the_text_may_come_late(first, tmp_path):
    file = written(tmp_path, {"a.jsonl": (first + "\n") * 2000 + LINES.decode()}) / "a.jsonl"
    texts, named = read(file)
    assert texts == PAGES
    assert named == ([] if '""' in first else ["rows without 'text': 2,000 (a.jsonl, line 1)"])


@pytest.mark.parametrize("broken", ['{"text": "half of a', "words", "{", '["a"', '{"text": "a"}}'])
def test_a_broken_line_costs_itself(broken, tmp_path, record):
    for at in range(3):
        lines = LINES.decode().splitlines(keepends=True)
        lines.insert(at, broken + "\n")
        file = written(tmp_path, {"a.jsonl": "".join(lines)}) / "a.jsonl"
        assert read(file) == (PAGES, [f"lines that are not JSON objects: 1 (a.jsonl, line {at + 1})"])
    record("a broken line among rows", 3)


CONTENTS = {
    "a.jsonl": LINES, "a.ndjson": LINES, "a.json": LINES, "a.JSONL": LINES, "one.jsonl": LINES, "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "wide.jsonl": LINES.decode().encode("utf-16"), "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "array.json": json.dumps(ROWS), "array.jsonl": json.dumps(ROWS), "indented.json": json.dumps(ROWS, indent=1),
    "lines.json": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", "strings.json": json.dumps(PAGES),
    "data.json": json.dumps({"version": "1", "data": ROWS}), "nested.json": json.dumps({"version": "1", "pages": ROWS}, indent=1),
    "nested-lines.json": '{"data": [\n' + ",\n".join(map(json.dumps, ROWS)) + "\n]}\n",
    "a.jsonl.gz": gzip.compress(LINES), "a.jsonl.bz2": bz2.compress(LINES), "a.jsonl.xz": lzma.compress(LINES), "a.ndjson.zst": zstd(LINES),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv": "id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in ROWS),
    "a.csv.gz": gzip.compress(b"id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in ROWS).encode()),
    "a.tsv": "id\ttext\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in ROWS),
    "only.csv": "id,body\n" + "".join(f"{row['id']},{row['text']}\n" for row in ROWS),
    "semicolons.csv": "id;text\n" + "".join(f"{row['id']};{row['text']}\n" for row in ROWS),
    "content.csv": "id,title,content\n" + "".join(f"{row['id']},title,{row['text']}\n" for row in ROWS),
    "a.parquet": parquet(text=PAGES, id=[0, 1, 2]), "a.parquet.zst": zstd(parquet(text=PAGES)),
    "bytes.parquet": parquet(text=pa.array([page.encode() for page in PAGES])),
    "fixed.parquet": parquet(text=pa.array([page.encode() for page in PAGES], pa.binary(len(PAGES[0])))),
    "large.parquet": parquet(text=pa.array(PAGES, pa.large_string())),
    "view.parquet": parquet(text=pa.array(PAGES, pa.string_view())),
    "codes.parquet": parquet(text=pa.array(PAGES).dictionary_encode()),
    "file.arrow": arrow(pa.table({"text": PAGES}), pa.ipc.new_file), "stream.arrow": arrow(pa.table({"text": PAGES}), pa.ipc.new_stream),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_rows_are_told_by_name_and_content(name, tmp_path):
    written(tmp_path, {name: CONTENTS[name]})
    assert read(tmp_path / name) == (PAGES, [])
    assert read(tmp_path) == (PAGES, [])


def test_csv_fields_hold_commas_quotes_and_lines(tmp_path):
    file = (
        written(
            tmp_path, {"a.csv": '\ufefftext,id\n"One, ""two""\nthree",1\nfour,five,2\nsix,3\n"seven" 8,4\nnine,5\n'}
        )
        / "a.csv"
    )
    texts, named = read(file)
    assert texts == ['One, "two"\nthree', "six", "nine"]
    assert named[0] == "rows with more or fewer fields than the first: 1 (a.csv, line 4)"
    assert named[1].startswith("rows that are broken: 1 (a.csv, line 6: ")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", '{"hidden_size": 4, "model_type": "llama"}', "holds no rows; left out JSON files without rows: 1 (config.json)"),
        ("a.json", '{"text": ', "cannot be read to their end: 1 (a.json, not JSON: Expecting value: line 1 column 10"),
        ("a.jsonl", "[1]\n{", "not JSON"),
        ("a.jsonl", json.dumps(ROWS[0], indent=1) * 2, "not JSON: Extra data: line 4 column 2"),
        ("a.jsonl", "words\nwords\n", "lines that are not JSON objects: 2 (a.jsonl, line 1)"),
        ("chat.jsonl", '{"messages": [{"role": "user"}]}', "no column 'text', but messages (lists)"),
        ("chat.jsonl#messages", '{"messages": [{"role": "user"}]}', "the column 'messages' holds lists, not text"),
        ("a.jsonl", '{"text": {"a": 1}}', "the column 'text' holds objects, not text"),
        ("a.jsonl", '{"text": true, "b": "x"}', "the column 'text' holds truth values, not text"),
        ("a.csv", "text\n1\n2.5\n", "the column 'text' holds numbers, not text"),
        ("a.csv", "", "holds no rows"),
        ("a.parquet", parquet(text=[[1.0], [2.0]]), "the column 'text' holds lists, not text"),
        ("a.parquet", parquet(text=[b"\x89PNG\0\xff"]), "the column 'text' holds bytes that are not text, not text"),
        ("a.parquet", parquet(text=PAGES)[:-9], "cannot be read to their end: 1 (a.parquet, Parquet"),
        ("a.jsonl.gz", LINES, "cannot be read to their end: 1 (a.jsonl.gz, Not a gzipped file"),
        ("a.txt", "Gr\u00f6\u00dfe ".encode("latin-1") * 9, "files of another encoding than UTF-8: 1 (a.txt)"),
        ("a.txt", "Words".encode("utf-16-le"), "files that are binary: 1 (a.txt)"),
        ("a.txt", b"\xff\xfe\x00\x81" * 99, "files that are binary: 1 (a.txt)"),
        ("a.txt.gz", gzip.compress(b"words " * 9, mtime=0)[:-9], "cannot be read to their end: 1 (a.txt.gz, Compressed file ended"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_one_line(name, content, words, tmp_path, record):
    written(tmp_path, {name.partition("#")[0]: content})
    for _ in range(2):
        with pytest.raises(UserError) as error:
            documents(str(tmp_path / name), 10**9)
        assert words in str(error.value)
        assert name.partition("#")[0] in str(error.value)
        assert "\n" not in str(error.value)
        assert "same command" not in str(error.value)
    record("a corpus that is no text", 2)


LINE_OF_A_BOOK = "A line of the b\u00f6\u00f6k.\n"


@pytest.mark.parametrize(
    ("content", "text", "named"),
    [
        ("\ufeffGr\u00f6\u00dfe".encode(), "Gr\u00f6\u00dfe", []),
        ("Gr\u00f6\u00dfe\n".encode("utf-16"), "Gr\u00f6\u00dfe\n", []),
        ("\ufeffGr\u00f6\u00dfe\n".encode("utf-16-be"), "Gr\u00f6\u00dfe\n", []),
        ("Gr\u00f6\u00dfe\n".encode("utf-32"), "Gr\u00f6\u00dfe\n", []),
        (b"A line.\n" * 3 + b"caf\xe9\n" + b"A line.\n" * 3, "A line.\n" * 6, ["5 (a.txt, the first at byte 27)"]),
        (b"words " * 999 + b"\xff" + b"words " * 999, "words " * 1998, ["1 (a.txt, the first at byte 5,994)"]),
        (LINE_OF_A_BOOK.encode() * 99 + b"\xc3", LINE_OF_A_BOOK * 99, ["1 (a.txt, the first at byte 2,178)"]),
        (b"A line.\r\n" * 3 + b"\xff\xff\n", "A line.\n" * 3, ["3 (a.txt, the first at byte 27)"]),
    ],
)  # fmt: skip
def test_bytes_that_are_not_utf8(content, text, named, tmp_path, record):
    file = written(tmp_path, {"a.txt": content}) / "a.txt"
    assert read(file) == ([text], [f"bytes that are not UTF-8: {line}" for line in named])
    record("a text file in another encoding, or with bad bytes", 1)


def test_a_bad_byte_of_a_large_book_costs_its_line(tmp_path):
    content = LINE_OF_A_BOOK.encode() * 100_000
    file = written(tmp_path, {"book.txt": content + b"caf\xe9\n" + content}) / "book.txt"
    texts, named = said(lambda: list(Documents(str(file))))
    assert "".join(texts) == LINE_OF_A_BOOK * 200_000
    assert named == ["bytes that are not UTF-8: 5 (book.txt, the first at byte 2,200,003)"]


def test_half_of_a_character_in_a_row_is_left_out(tmp_path):
    rows = [{"text": "x" * 200 + "\ud83d"}, {"text": "a\U0001f600"}, {"text": "bad \udcff"}]
    file = written(tmp_path, {"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}) / "a.jsonl"
    assert read(file) == (["x" * 200, "a\U0001f600"], ["bytes that are not UTF-8: 6 (a.jsonl, line 1)"])
    assert cleaned("plain \u00f6") == ("plain \u00f6", 0)


def test_a_damaged_file_costs_itself_and_is_named(tmp_path):
    files = {"a.txt": "one", "b.txt.gz": gzip.compress(b"two " * 99)[:-9], "c.txt": "three", "d.txt.gz": b"four"}
    texts, named = read(written(tmp_path, files))
    assert texts == ["one", "three"]
    [line] = named
    assert line.startswith("files that cannot be read to their end: 2 (b.txt.gz, Compressed file ended")
    assert "d.txt.gz, Not a gzipped file" in line


def test_the_folder_says_which_files_are_a_subset(tmp_path):
    card = (
        "---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n- config_name: de\n  data_files: de/*.jsonl\n---\n"
    )
    written(
        tmp_path,
        {"README.md": card, "en/a.jsonl": '{"text": "One."}', "de/a.jsonl": '{"text": "Eins."}', "c.txt": "words"},
    )
    assert read(f"{tmp_path}:de") == (["Eins."], [])
    with pytest.raises(UserError, match=r"Config name is missing.*'de'"):
        Documents(str(tmp_path))


def test_a_saved_data_set_by_the_same_rules(tmp_path):
    saved = datasets.Dataset.from_dict({"text": [b"A page.", None, b"\0\xff", b"Another."], "n": range(4)})
    saved.save_to_disk(tmp_path / "saved")
    texts, named = read(tmp_path / "saved")
    assert texts == ["A page.", "Another."]
    assert named == [
        "rows without 'text': 1 (row 2)",
        "rows whose 'text' is not text: 1 (row 3: bytes that are not text)",
    ]
    datasets.Dataset.from_dict({"text": [[1], [2]]}).save_to_disk(tmp_path / "lists")
    with pytest.raises(UserError, match="the column 'text' holds lists, not text"):
        Documents(str(tmp_path / "lists"))


@pytest.mark.parametrize(("error", "kind"), [(ConnectionError("reset"), RunFailed), (ValueError("no cast"), UserError)])
def test_the_same_command_continues_only_where_it_can(error, kind, tmp_path):
    datasets.Dataset.from_dict({"text": PAGES}).save_to_disk(tmp_path / "saved")
    stream = Documents(str(tmp_path / "saved"))

    def broken():
        raise error
        yield

    stream.sources[0].data = broken()  # what a hub's client raises in the midst of a stream
    with pytest.raises(kind) as found:
        list(stream)
    assert ("the same command continues" in str(found.value)) == (kind is RunFailed)


def test_a_stream_with_gaps_continues_where_it_stood(tmp_path):
    files = {
        f"{i}.jsonl": b'{"id": 1}\n' + LINES + b"{broken\n" + LINES.replace(b"0", b"\xff") + LINES for i in range(3)
    }
    files |= {
        "3.jsonl.gz": gzip.compress(LINES * 3)[:-9],
        "4.csv": "text,id\nwords,1\nwords\n",
        "5.parquet": parquet(text=[*PAGES, None]),
    }
    source = str(written(tmp_path, files))
    everything, named = said(lambda: list(Documents(source)))
    assert len(everything) > 20
    assert len(named) > 3
    for cut in range(len(everything) + 1):
        first, again = Documents(source), Documents(source)
        iterator = first.read()
        assert [next(iterator) for _ in range(cut)] == everything[:cut]
        again.restore(json.loads(json.dumps(first.state())))
        assert said(lambda again=again: list(again)) == (everything[cut:], named)


def test_the_disks_own_errors_are_not_left_out(tmp_path):
    stream = Documents(str(written(tmp_path, {"a.txt": "one", "b.txt": "two"})))
    os.unlink(tmp_path / "b.txt")
    with pytest.raises(FileNotFoundError):
        list(stream)


@pytest.mark.parametrize(
    "name",
    [
        "./book",
        "~/nowhere",
        "a//b",
        "a/b/c",
        "book.tsv",
        "book.txt.gz",
        "two words",
        "book/",
        "{here}/boks",
        "a\\b",
        "json",
    ],
)
def test_what_can_only_be_a_path_is_said_at_once(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(sources, "_load", None)
    with pytest.raises(UserError, match="does not exist"):
        Documents(name.format(here="here"))
    assert is_hub_name("org/name-1.5_x")
    assert is_hub_name("name")


def test_the_command_says_what_was_left_out_in_one_line_each(tmp_path):
    lines = [json.dumps({"text": " ".join(f"{j} {j * i % 97}" for j in range(200))}) + "\n" for i in range(40)]
    written(tmp_path / "text", {"a.jsonl": "".join(lines) + "{broken\n", "LICENSE": "words"})
    command = [
        sys.executable,
        "-m",
        "ssmax",
        "prepare",
        "smoke",
        "--corpus",
        tmp_path / "text",
        "--cache",
        tmp_path / "cache",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "ssmax: corpus 'text': left out files beside the rows: 1 (LICENSE)",
        "ssmax: corpus 'text': left out lines that are not JSON objects: 1 (a.jsonl, line 41)",
    ]
    [manifest] = (tmp_path / "cache").glob("*/manifest.json")
    assert [line.partition(":")[0] for line in json.loads(manifest.read_text())["left_out"]] == [
        "files beside the rows",
        "lines that are not JSON objects",
    ]
