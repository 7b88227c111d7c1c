"""Which files of a folder are its corpus: files of rows, otherwise text files, never hidden files. No torch."""

import os
import re
from pathlib import Path

from ssmax.data import row_files
from ssmax.data.text import Account
from ssmax.errors import UserError

# Names of files that describe the data and are not part of it.
COMPANION = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|citation|change(log|s)|contributing|code_of_conduct|_success|manifest|"
    r"checksums?|(md5|sha\d+)sums?|stats?|requirements)\b|.*\.(md|json|ya?ml|toml|cfg|ini|log|lock|crc|md5|sha\d+|sums?)$",
    re.IGNORECASE,
)
# Words in names of files and folders that name a split, as in datasets.
SPLIT = re.compile(
    r"(?<![a-z])(?:(train|training)|valid|validation|val|dev|test|testing|eval|evaluation)(?![a-z])", re.IGNORECASE
)


def visible_files(folder: Path) -> list[Path]:
    """Return all files in a folder, in the order of names, without hidden files and hidden folders."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def find_corpus(folder: Path, files: list[Path], wanted: str | None, account: Account) -> tuple[list[Path], str | None]:
    """Return the files that are a folder's corpus, and their column of text; the column is None for text files.

    If the folder has files of rows with a column of text, these are the corpus, and all other files
    are left out.

    Args:
        folder: the folder.
        files: its files that may belong to the corpus.
        wanted: the column that the user asked for, or None.
        account: records what is left out.

    Raises:
        UserError: rows without a column of text and no text files, or several splits without train.
    """
    tables = [path for path in files if row_files.is_rows(path)]
    others = [path for path in files if not row_files.is_rows(path)]
    if not tables:
        return files, None
    texts = any(COMPANION.match(path.name) is None and path.stat().st_size for path in others)
    try:
        column = row_files.column_of_files(tables, wanted, str(folder), named=texts)
    except UserError:
        tables = [
            path for path in tables if path.suffix.lower() != ".json"
        ]  # in a folder of text, .json files are text
        if wanted or (tables and not texts) or not any(path.stat().st_size for path in others):
            raise
        for path in tables:
            account.add("files of rows without a column 'text' beside text", name_in(folder, path))
        return [path for path in files if path not in set(tables)], None
    for path in others:
        if path.stat().st_size:
            account.add("files beside the rows", name_in(folder, path))
    return _train_split(folder, tables, account), column


def declared_files(folder: Path, subset: str | None) -> list[Path] | None:
    """Return the files that a folder's README.md declares for a subset, like data sets on a hub; None if it declares none."""
    card = folder / "README.md"
    front = re.match(r"---\n(.*?\n)---", card.read_text(errors="replace"), re.DOTALL) if card.is_file() else None
    if subset is None and (front is None or re.search(r"^configs:", front[1], re.MULTILINE) is None):
        return None
    import datasets

    found = datasets.load_dataset_builder(str(folder.resolve()), subset).config.data_files or {}
    return [Path(name) for name in found.get("train", next(iter(found.values()), []))]


def is_saved(folder: Path) -> bool:
    """Return whether a folder was written by save_to_disk of datasets."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and any(folder.glob("*.arrow"))
    )


def _train_split(folder, tables, account):
    """Return the files without those whose names say another split than train, unless all do."""
    splits = {path: _split(name_in(folder, path)) for path in tables}
    other = {path for path, split in splits.items() if split not in ("", "train")}
    if len(other) == len(tables):
        names = sorted(set(splits.values()))
        if len(names) > 1:
            raise UserError(
                f"data set {str(folder)!r} has no split 'train', but {', '.join(names)}; give the files of one split"
            )
        return tables
    for path in tables:
        if path in other:
            account.add("files of other splits than train", name_in(folder, path))
    return [path for path in tables if path not in other]


def _split(name):
    found = SPLIT.search(name)
    return "" if found is None else "train" if found[1] else found[0].lower()


def name_in(folder: Path, path: Path) -> str:
    """Return the name of a path relative to a folder."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name
