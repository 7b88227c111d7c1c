"""The tokenizer of a corpus: a given one, or a byte-pair tokenizer trained on the text."""

import hashlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from ssmax.errors import UserError
from ssmax.runs.hub import cached_only_offline, is_hub_name, reason

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class GivenTokenizer:
    """A tokenizer of transformers.

    Attributes:
        name: as the user gave it.
        files: transformers' tokenizer, which writes its files.
        core: the tokenizer that makes ids.
        end: id of the end-of-text token.
    """

    name: str
    files: Any
    core: Tokenizer
    end: int

    @property
    def sha256(self) -> str:
        """Hash of the tokenizer itself, independent of file names."""
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()


def load_given_tokenizer(name: str, *, cached_only: bool = False) -> GivenTokenizer:
    """Load a tokenizer from a folder, a tokenizer.json, or a hub by its name.

    Args:
        name: a folder, a tokenizer.json, or a name on a hub.
        cached_only: do not ask the hub; use its cache.

    Raises:
        UserError: it does not exist, is not a fast tokenizer, or has no end-of-text token.
    """
    if not Path(name).expanduser().exists() and (not is_hub_name(name) or name.endswith(".json")):
        raise UserError(f"--tokenizer {name} does not exist; give a folder with a tokenizer.json, or a name on a hub")
    try:
        files = _load(name, cached_only)
        core = Tokenizer.from_str(files.backend_tokenizer.to_str())  # a copy that transformers does not change
    except Exception as error:  # the hub's client and damaged files raise many kinds of errors; the user needs one line
        raise UserError(
            f"--tokenizer {name} is not a tokenizer on this machine or on a hub that can be reached: {reason(error)}; give a "
            "folder with a tokenizer.json"
        ) from error
    core.no_truncation()
    core.no_padding()
    if files.eos_token is None and core.token_to_id(END_OF_TEXT) is not None:
        files.eos_token = END_OF_TEXT
    if files.eos_token is None:
        raise UserError(
            f"--tokenizer {name} has no end-of-text token, which separates documents; give a folder whose "
            "tokenizer_config.json has an eos_token"
        )
    return GivenTokenizer(name, files, core, files.eos_token_id)


def _load(name, cached_only) -> Any:
    logging.set_verbosity_error()
    path = Path(name).expanduser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        if path.is_dir():
            return AutoTokenizer.from_pretrained(str(path))
        if not cached_only:
            cached_only_offline()
        return AutoTokenizer.from_pretrained(name, local_files_only=cached_only)


def vocabulary(tokenizer: Tokenizer) -> int:
    """Return the number of ids that a model must know: the largest id and one, since ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def train_tokenizer(texts: list[str], vocab_size: int, words: Sequence[str] = ()) -> Tokenizer:
    """Train a byte-pair tokenizer in which each digit is a token, and add words as single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(words))
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a trained tokenizer as one of transformers, which can be saved and loaded."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
