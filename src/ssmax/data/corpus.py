"""Tokenises a corpus into training tokens and held-out texts, with a given tokenizer or one trained on the text."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ssmax.data.preparation import prepare_stream
from ssmax.data.shards import HELD_OUT, Manifest, Shards, ShardWriter, check, is_prepared, locked, token_type
from ssmax.data.sources import Documents
from ssmax.data.tokenizer import END_OF_TEXT, train_tokenizer, vocabulary, wrapped
from ssmax.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus.

    Attributes:
        tokenizer: encodes text.
        end: id of the end-of-text token, which precedes each document.
        train: (T,) integers, read by slices; documents one after another.
        held_out: (K, L) integers: K texts of L tokens that train does not contain.
    """

    tokenizer: Tokenizer
    end: int
    train: Shards
    held_out: np.ndarray

    @property
    def vocab_size(self) -> int:
        """Number of ids that a model must know."""
        return vocabulary(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return ids without special tokens around them."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def prepare(
    source: str | None,
    *,
    limit_bytes: int,
    vocab_size: int,
    held_out: tuple[int, int],
    cache: Path,
    tokenizer: str = "",
    tokens: int = 0,
    words: tuple[str, ...] = (),
) -> tuple[Path, str]:
    """Tokenise a corpus into a folder of the cache, unless it is there already; return the folder and the corpus's name.

    With a tokenizer, documents are read as a stream: see prepare_stream. Without one, they are held
    in memory and a byte-pair tokenizer is trained on them. The folder's name is a hash of the text
    and of the way in which it was tokenised.

    Args:
        source: see ssmax.data.sources.Documents; or a folder that was prepared before.
        limit_bytes: bytes of text to hold in memory, without a tokenizer.
        vocab_size: tokens of the trained tokenizer, without words.
        held_out: (K, L), the number of held-out texts and their length in tokens.
        cache: folder for tokenised corpora.
        tokenizer: see ssmax.data.tokenizer.load_given_tokenizer; empty: train one.
        tokens: number of training tokens to prepare, with a tokenizer.
        words: words that become single tokens of the trained tokenizer.

    Raises:
        UserError: the text is too short for what is asked, or the prepared folder does not fit.
    """
    if source is not None and is_prepared(folder := Path(source).expanduser()):
        _check_prepared(folder, tokenizer, held_out[1])
    elif tokenizer:
        folder = prepare_stream(source, tokenizer=tokenizer, tokens=tokens, held_out=held_out, cache=cache)
    else:
        folder = _prepare_in_memory(source, limit_bytes, vocab_size, held_out, cache, words)
    return folder, check(folder).source


def load(folder: Path) -> Corpus:
    """Load a tokenised corpus from a folder that prepare wrote. Training tokens are mapped and read when they are sliced.

    Raises:
        UserError: a file is missing or of another size.
    """
    manifest = check(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Corpus(tokenizer, manifest.tokenizer["end"], Shards(folder, manifest), np.load(folder / HELD_OUT))


def _check_prepared(folder, tokenizer, length):
    manifest = check(folder)
    if tokenizer and tokenizer != manifest.tokenizer["name"]:
        raise UserError(
            f"{folder} was prepared with the tokenizer {manifest.tokenizer['name']!r}, and the recipe asks for {tokenizer!r}; "
            "give the same --tokenizer, or prepare it again"
        )
    if manifest.held_out["length"] < length:
        raise UserError(
            f"{folder} has held-out texts of {manifest.held_out['length']:,} tokens, and the recipe needs {length:,} "
            "(--length-factor times --train-length, and one); prepare it again with these"
        )


def _prepare_in_memory(source, limit_bytes, vocab_size, held_out, cache, words):
    stream = Documents(source, piece=-1)
    texts = stream.in_memory(limit_bytes)
    recipe = f"1 {vocab_size} {held_out} {words}"
    digest = hashlib.sha256(recipe.encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    folder = cache / digest.hexdigest()[:16]
    if Manifest.read(folder) is None:
        tokenizer, train, held = _tokenised(texts, vocab_size, held_out, words)
        with locked(folder):
            wrapped(tokenizer).save_pretrained(folder / "tokenizer")
            saved = (folder / "tokenizer" / "tokenizer.json").read_bytes()
            made = {"name": "", "end": tokenizer.token_to_id(END_OF_TEXT), "vocabulary": vocabulary(tokenizer)}
            made["sha256"] = hashlib.sha256(saved).hexdigest()
            size = sum(len(text.encode()) for text in texts)
            manifest = Manifest(
                stream.name, made, token_type(made["vocabulary"]), len(texts), size, fingerprint=folder.name
            )
            manifest.left_out = stream.left_out()
            writer = ShardWriter(folder, manifest)
            while len(train):
                train = train[writer.add(train) :]
                writer.finish_shard()
            manifest.write(folder, held.astype(manifest.dtype))
    return folder


def _tokenised(texts, vocab_size, held_out, words):
    order = np.random.default_rng(0).permutation(len(texts))
    texts = [texts[i] for i in order]
    if len(texts) == 1:  # one long text: its last tenth is held out
        cut = len(texts[0]) * 9 // 10
        texts = [texts[0][:cut], texts[0][cut:]]
    tokenizer = train_tokenizer(texts, vocab_size, words)
    encoded = [np.array(e.ids, dtype=np.int32) for e in tokenizer.encode_batch_fast(texts)]
    end = tokenizer.encode(END_OF_TEXT).ids[0]
    held, kept = _split(encoded, end, *held_out)
    return tokenizer, np.concatenate([np.concatenate([[end], ids]).astype(np.int32) for ids in kept]), held


def _split(encoded, end, count, length):
    """Cut `count` held-out texts of `length` tokens from as many documents as possible, at most a tenth of all tokens.

    Documents of up to four times that length come first: a longer one would take more text from the
    training.
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
        longest, total = max(map(len, encoded)), sum(map(len, encoded))
        short = f"held-out texts need documents of {length} tokens, and the longest has {longest}"
        few = f"held-out texts of {length} tokens leave nothing to train on of {total:,} tokens"
        raise UserError(
            f"the text is too short: {short if longest < length - 1 else few}; give a longer corpus, or lower --train-length"
        )
    return np.stack(held[:count]), kept
