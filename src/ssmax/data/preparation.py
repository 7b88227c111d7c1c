"""Tokenises a stream of documents into shards, with a given tokenizer and the memory of one batch. A kill loses one shard."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssmax.data.shards import HELD_OUT, SHARD_TOKENS, VERSION, Manifest, ShardWriter, locked, token_type
from ssmax.data.sources import Documents, warn_left_out
from ssmax.data.tokenizer import GivenTokenizer, load_given_tokenizer, vocabulary
from ssmax.errors import UserError
from ssmax.runs.progress import progress_bar

BATCH_BYTES = 2**22  # of text that is tokenised at once
HELD_OUT_SHARE = 10  # one long text in so many is held out


def prepare_stream(
    source: str | None,
    *,
    tokenizer: str,
    tokens: int,
    held_out: tuple[int, int],
    cache: Path,
    shard_tokens: int = SHARD_TOKENS,
) -> Path:
    """Tokenise documents into a folder of the cache, until there are enough training tokens or no more documents.

    What cannot be read is left out, with a LeftOut warning. An interrupted preparation continues
    after its last complete shard and ends with the same shards. The hash of a text decides whether
    it is held out, with all its copies, so that a held-out text is never trained on.

    Args:
        source: see ssmax.data.sources.Documents.
        tokenizer: see ssmax.data.tokenizer.load_given_tokenizer.
        tokens: number of training tokens that are enough.
        held_out: (K, L), the largest number of held-out texts, and their length in tokens.
        cache: folder for tokenised corpora.
        shard_tokens: tokens in each shard except the last.

    Returns:
        The folder.

    Raises:
        UserError: a bad source or tokenizer, or no text that is long enough to be held out.
    """
    chosen, stream = load_given_tokenizer(tokenizer), Documents(source)
    key = [VERSION, stream.identity(), chosen.sha256, chosen.end, tokens, held_out, shard_tokens]
    folder = cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    with locked(folder):
        manifest = Manifest.read(folder)
        if manifest is None:
            chosen.files.save_pretrained(folder / "tokenizer")
            manifest = Manifest(stream.name, _described(chosen, folder), token_type(vocabulary(chosen.core)))
            manifest.write(folder, np.empty((0, held_out[1]), manifest.dtype))
        if not manifest.fingerprint:
            try:
                _Preparation(stream, chosen, folder, manifest, tokens, held_out, shard_tokens).run()
            except UserError:
                shutil.rmtree(folder)  # it cannot be continued
                raise
    warn_left_out(manifest.source, manifest.left_out)
    return folder


def _described(chosen, folder):
    digest = hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    return {"name": chosen.name, "end": chosen.end, "vocabulary": vocabulary(chosen.core), "sha256": digest}


class _Preparation:
    """One preparation, from the position in its manifest."""

    def __init__(
        self,
        stream: Documents,
        tokenizer: GivenTokenizer,
        folder: Path,
        manifest: Manifest,
        target: int,
        held_out: tuple[int, int],
        shard_tokens: int,
    ):
        self.stream, self.tokenizer, self.folder, self.manifest = stream, tokenizer, folder, manifest
        self.target, (self.wanted, self.length) = target, held_out
        self.writer = ShardWriter(folder, manifest, shard_tokens)
        self.documents, self.done, self.skip = 0, 0, 0
        self.seen = 0  # tokens done, and those read beyond the target
        self.held: list[np.ndarray] = []
        if manifest.resume is not None:
            self._restore(manifest.resume)
        self.copies = {_hash(text) for text in self.held}
        tokenizer.core.encode_special_tokens = True  # "<|endoftext|>" inside a text is encoded as text

    def _state(self) -> dict[str, Any]:
        """Return the position at which the next batch begins."""
        return {"stream": self.stream.state(), "documents": self.documents, "tokens": self.done}

    def _restore(self, state):
        self.stream.restore(state["stream"])
        self.documents, self.done, self.skip = state["documents"], state["tokens"], state["written"]
        self.seen = self.done
        self.held = list(np.load(self.folder / HELD_OUT))  # also those of the repeated batch, which are held out again

    def run(self) -> None:
        """Write all shards and the finished manifest."""
        start = self.manifest.tokens
        with progress_bar(self.target, "preparing corpus", unit="tokens", initial=start, delay=3) as bar:
            for state, texts in self._batches():
                tokens = self._training_tokens(texts)
                self.seen += len(tokens)
                self._write(state, tokens[: self.target - self.done], bar)
                if self._is_enough():
                    break
        self.writer.finish_shard()
        if not self.documents:
            raise self.stream.without_text()
        if not self.held or not self.manifest.tokens:
            raise UserError(
                f"the text is too short: {self.documents:,} documents with {self.seen:,} tokens gave {len(self.held)} held-out texts "
                f"and {self.manifest.tokens:,} training tokens (one in {HELD_OUT_SHARE} texts of {self.length:,} tokens or more is "
                "held out); give more and longer texts, or lower --train-length or --length-factor"
            )
        self._save(None)
        self.manifest.fingerprint = self.manifest.content_hash()
        self.manifest.write(self.folder)

    def _is_enough(self):
        """Return whether to stop reading.

        After the training tokens, up to 1,000 held-out lengths are read to find more held-out
        texts. If so much text has shown none, reading stops early, with an error.
        """
        searched = self.seen >= 1000 * self.length
        if self.done < self.target:
            return searched and not self.held
        return searched or len(self.held) == self.wanted

    def _batches(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        state, texts, size = self._state(), [], 0
        for text in self.stream.read():
            texts.append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                yield state, texts
                state, texts, size = self._state(), [], 0
        if texts:
            yield state, texts

    def _write(self, state, tokens, bar):
        at, self.skip = self.skip, 0
        while at < len(tokens):
            added = self.writer.add(tokens[at:])
            at += added
            bar.update(added)
            if self.writer.full:
                self.writer.finish_shard()
                self._save({**state, "written": at})
        self.done += len(tokens)

    def _save(self, resume):
        self.manifest.documents, self.manifest.bytes = self.documents, sum(self.stream.bytes_read)
        self.manifest.left_out, self.manifest.resume = self.stream.left_out(), resume
        held = np.stack(self.held) if self.held else np.empty((0, self.length))
        self.manifest.write(self.folder, held.astype(self.manifest.dtype))

    def _training_tokens(self, texts: list[str]) -> np.ndarray:
        """Tokenise a batch, take out held-out texts, and return the rest. Each document begins with the end-of-text token."""
        self.documents += len(texts)
        kept = [np.empty(0, self.manifest.dtype)]
        for encoding in self.tokenizer.core.encode_batch_fast(texts, add_special_tokens=False):
            kept += self._kept([self.tokenizer.end, *encoding.ids])
        return np.concatenate(kept)

    def _kept(self, ids: list[int]) -> Iterator[np.ndarray]:
        """Yield the sections of a document that are not held out; a section is four times as long as a held-out text."""
        document, gap = np.array(ids, self.manifest.dtype), False
        for first in range(0, len(document), 4 * self.length):
            section = document[first : first + 4 * self.length]
            if len(section) >= self.length and self._holds_out(section[: self.length]):
                gap = True
                continue
            if gap:
                yield document[:1]
            gap = False
            yield section

    def _holds_out(self, text: np.ndarray) -> bool:
        digest = _hash(text)
        if digest[0] * HELD_OUT_SHARE >= 256:
            return False
        if digest not in self.copies and len(self.held) < self.wanted:
            self.copies.add(digest)
            self.held.append(text.copy())
        return digest in self.copies


def _hash(text):
    return hashlib.sha256(np.ascontiguousarray(text).tobytes()).digest()
