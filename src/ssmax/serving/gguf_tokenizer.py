"""Export of tokenizers to GGUF: only those that llama.cpp reproduces exactly."""

import json
import re
from pathlib import Path
from typing import Any

from ssmax.errors import UserError
from ssmax.hf.loading import load_tokenizer
from ssmax.runs.failures import user_errors

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CLITICS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The steps by which byte-level tokenizers split text before they merge, and llama.cpp's name for each. "llama-bpe" takes a
# word that is a token without merging (IGNORES_MERGES).
PRETOKENIZERS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    ((r"Split", rf"{_CLITICS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), ("ByteLevel", False)): "llama-bpe",
    ((r"Split", rf"{_CLITICS}|{_WORDS}|\p{{N}}|{_REST}"), ("ByteLevel", False)): "qwen2",
}
IGNORES_MERGES = {"llama-bpe"}
PREFIXED = {"Prepend", "Replace"}


def add_tokenizer(writer: Any, gguf: Any, folder: Path, vocab_size: int) -> str:
    """Add the tokenizer in a model's folder to a GGUF writer, and return a short description of it.

    Raises:
        UserError: the folder has no tokenizer, or llama.cpp would split texts differently.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json; a GGUF file carries its tokenizer")
    with user_errors():
        tokenizer, content = load_tokenizer(folder), json.loads(path.read_bytes())
    model = content["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        kind, name = "llama", _sentencepiece(content)
    elif model["type"] == "BPE":
        kind, name = "gpt2", _byte_level(content)
    else:
        raise UserError(f"ssmax export gguf takes BPE tokenizers, got {model['type']}")
    special = gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=vocab_size)
    sample = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": len(sample) > 0 and sample[0] == tokenizer.bos_token_id,
        "eos": len(sample) > 0 and sample[-1] == tokenizer.eos_token_id,
    }
    tokens, types = _tokens(gguf, tokenizer, content, vocab_size)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores(_scores(tokens, model))
        writer.add_add_space_prefix(_prepends(content))
    special.add_to_gguf(writer, quiet=True)
    return (
        f"a {'SentencePiece-like' if kind == 'llama' else 'byte-level'} tokenizer of {len(tokenizer):,} tokens ({name})"
    )


def _byte_level(content):
    normalizer = content.get("normalizer")
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    name = PRETOKENIZERS.get(tuple(_step(step) for step in steps))
    if name is None:
        raise UserError(f"llama.cpp would split texts differently from this tokenizer, whose steps are {steps}")
    if bool(content["model"].get("ignore_merges")) != (name in IGNORES_MERGES):
        raise UserError(f"llama.cpp would merge tokens differently: ignore_merges does not fit a tokenizer like {name}")
    if normalizer is not None and not (name == "qwen2" and normalizer == {"type": "NFC"}):
        raise UserError(f"llama.cpp does not normalize texts as this tokenizer does: {normalizer}")
    return name


def _step(step):
    kind = step.get("type")
    if kind == "ByteLevel":
        return (kind, step.get("use_regex", True)) if not step.get("add_prefix_space") else None
    if kind == "Digits":
        return kind, step.get("individual_digits")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, step["pattern"].get("Regex")
    return None


def _sentencepiece(content):
    """Return llama.cpp's name if this is SentencePiece's BPE: spaces become a mark, and unknown characters become bytes."""
    steps = content.get("normalizer") or {}
    steps = steps.get("normalizers", [steps])
    before = content.get("pre_tokenizer")
    by_normalizer = before is None and {step.get("type") for step in steps} in (PREFIXED, {"Replace"})
    by_metaspace = (
        steps == [{}] and before is not None and before.get("type") == "Metaspace" and not before.get("split", True)
    )
    marks = {step["content"] for step in steps if step.get("type") == "Replace"} | {
        (before or {}).get("replacement", "▁")
    }
    if not (by_normalizer or by_metaspace) or marks != {"▁"}:
        raise UserError("llama.cpp would split texts differently from this tokenizer, which is not a SentencePiece BPE")
    return "default"


def _prepends(content):
    steps = (content.get("normalizer") or {}).get("normalizers", [content.get("normalizer") or {}])
    scheme = (content.get("pre_tokenizer") or {}).get("prepend_scheme")
    return any(step.get("type") == "Prepend" for step in steps) or scheme in ("first", "always")


def _scores(tokens, model):
    """Return a score for each token: the earlier the merge that makes it, the higher."""
    ranks = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _tokens(gguf, tokenizer, content, vocab_size):
    """Return all tokens by id, and their types. Ids of the model that the tokenizer does not know are unused."""
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(known) >= vocab_size:
        raise UserError(f"the tokenizer has token ids up to {max(known)}, but the model has {vocab_size} rows")
    unknown, kinds = content["model"].get("unk_token"), gguf.TokenType
    tokens, types = [], []
    for index in range(vocab_size):
        token = known.get(index, f"[PAD{index}]")
        if index not in known:
            kind = kinds.UNUSED
        elif token == unknown:
            kind = kinds.UNKNOWN
        elif index in added:
            kind = kinds.CONTROL if added[index].get("special") else kinds.USER_DEFINED
        elif content["model"].get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind = kinds.BYTE
        else:
            kind = kinds.NORMAL
        tokens.append(token)
        types.append(kind)
    return tokens, types
