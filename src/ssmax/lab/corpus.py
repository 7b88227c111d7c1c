"""Text to tokens: documents, a byte-pair tokenizer trained on them, a training stream and held-out long texts."""

import hashlib
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ssmax.errors import UserError
from ssmax.evaluation.tasks import CITIES
from ssmax.results import write_atomically

__all__ = ["END_OF_TEXT", "Corpus", "documents", "load", "prepare"]

END_OF_TEXT = "<|endoftext|>"
# Whole tokens: a small vocabulary would split the sentence into more tokens than a small window has room for.
NEEDLE_WORDS = ("The", " special", " magic", " number", " is:", *(f" {x}" for x in (*CITIES, *range(10))))
# Tests of the standard library repeat themselves and are not shipped with every Python.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus.

    Attributes:
        tokenizer: byte-pair, each digit a token, the needle's words whole.
        train: (T,) int32, documents in a fixed shuffled order, each behind an end-of-text token.
        held_out: (K, L) int32, texts cut from the starts of documents that train does not contain.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray


def documents(source: str | None, limit_bytes: int) -> tuple[list[str], str]:
    """Read the documents of a source, and describe it.

    Args:
        source: None for Python's own standard library without its tests; a text file; a folder of text files; or the
            name of a data set on a hub with a column "text".
        limit_bytes: read no more than so much text.

    Raises:
        UserError: nothing there, or nothing readable.
    """
    if source is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
        found, name = _read_files(sorted(paths)), "Python's standard library"
    elif Path(source).is_file():
        found, name = _read_files([Path(source)]), Path(source).name
    elif Path(source).is_dir():
        found, name = _read_files(sorted(p for p in Path(source).rglob("*") if p.is_file())), Path(source).name
    elif source.startswith((".", "/", "~")) or os.sep * 2 in source or source.count("/") > 1 or Path(source).suffix:
        raise UserError(f"corpus {source!r} does not exist; give a text file, a folder, or the name of a data set")
    else:
        found, name = _read_dataset(source), source
    texts, total = [], 0
    for text in found:
        texts.append(text)
        total += len(text.encode())
        if total >= limit_bytes:
            break
    if not total:
        raise UserError(f"corpus {name!r} holds no text; give UTF-8 text files or a data set with a column 'text'")
    return texts, name


def prepare(
    source: str | None, *, limit_bytes: int, vocab_size: int, held_out: tuple[int, int], cache: Path
) -> tuple[Path, str]:
    """Read, split and tokenise a corpus into a folder of the cache, unless it is there; return folder and description.

    The folder's name is a hash of the documents and of how they were tokenised.

    Args:
        source, limit_bytes: as for documents.
        vocab_size: of the byte-pair tokenizer, the needle's words not counted.
        held_out: (K, L), how many held-out texts of how many tokens.
        cache: folder for tokenised corpora.

    Raises:
        UserError: the text is too short for what is asked.
    """
    texts, name = documents(source, limit_bytes)
    recipe = f"1 {vocab_size} {held_out} {NEEDLE_WORDS}"
    digest = hashlib.sha256(recipe.encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    folder = cache / digest.hexdigest()[:16]
    if not folder.exists():
        _build(texts, vocab_size, held_out, folder)
    return folder, name


def load(folder: Path) -> Corpus:
    """Load a tokenised corpus that prepare left in folder."""
    arrays = load_file(folder / "tokens.safetensors")
    return Corpus(Tokenizer.from_file(str(folder / "tokenizer.json")), arrays["train"], arrays["held_out"])


def _build(texts, vocab_size, held_out, folder):
    order = np.random.default_rng(0).permutation(len(texts))
    texts = [texts[i] for i in order]
    if len(texts) == 1:  # one long text: its last tenth is held out
        cut = len(texts[0]) * 9 // 10
        texts = [texts[0][:cut], texts[0][cut:]]
    tokenizer = _train_tokenizer(texts, vocab_size)
    encoded = [np.array(e.ids, dtype=np.int32) for e in tokenizer.encode_batch(texts)]
    end = tokenizer.encode(END_OF_TEXT).ids[0]
    held, kept = _split(encoded, end, *held_out)
    train = np.concatenate([np.concatenate([[end], ids]).astype(np.int32) for ids in kept])
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tokenizer.save(str(temporary / "tokenizer.json"))
    write_atomically(temporary / "tokens.safetensors", save({"train": train, "held_out": held}))
    temporary.rename(folder)


def _train_tokenizer(texts, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(NEEDLE_WORDS))
    return tokenizer


def _split(encoded, end, count, length):
    """Cut count held-out texts of length tokens from as many documents as possible, a tenth of all tokens at most.

    Documents of a few times that length come first: a very long one would take much from the training for one text.
    """
    budget = sum(map(len, encoded)) // 10 + length
    long_enough = [i for i, ids in enumerate(encoded) if len(ids) >= length - 1]
    long_enough.sort(key=lambda i: len(encoded[i]) > 4 * length)
    each = -(-count // max(1, len(long_enough)))
    held, taken = [], set()
    for i in long_enough:
        if len(held) < count and len(encoded[i]) <= budget:
            budget -= len(encoded[i])
            taken.add(i)
            text = np.concatenate([[end], encoded[i]]).astype(np.int32)
            held += [text[j : j + length] for j in range(0, len(text) - length + 1, length)][:each]
    kept = [ids for i, ids in enumerate(encoded) if i not in taken]
    if not held or not kept:
        longest = max(map(len, encoded))
        raise UserError(
            f"the text is too short: held-out texts of {length} tokens are needed beside the training text, the longest "
            f"document has {longest}; give a longer corpus, or lower --train-length"
        )
    return np.stack(held[:count]), kept


def _read_files(paths) -> Iterator[str]:
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, PermissionError):
            continue
        if text.strip():
            yield text


def _read_dataset(name) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True)
        yield from (row["text"] for row in rows)
    except KeyError:
        raise UserError(f"data set {name!r} has no column 'text'") from None
    except Exception as error:  # whatever the hub's client raises, the user needs one line
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name!r} is no file or folder here, and could not be loaded as a data set: {reason}"
        ) from error
