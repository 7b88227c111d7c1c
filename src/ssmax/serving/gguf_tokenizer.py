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
NFC = {"type": "NFC"}


def add_tokenizer(writer: Any, gguf: Any, folder: Path, vocab_size: int) -> str:
    """Add the tokenizer in a model's folder to a GGUF writer, and return a short description of it.

    Raises:
        UserError: the folder has no tokenizer, or llama.cpp would split texts differently.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json; a GGUF file carries its tokenizer")
    with user_errors():
        tokenizer = load_tokenizer(folder)
    # Its class may split texts in another way than the file says.
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    for option in ("end_of_word_suffix", "continuing_subword_prefix", "dropout"):
        if model.get(option):
            raise UserError(f"llama.cpp would split texts differently: the tokenizer's model has the option {option}")
    if model["type"] == "BPE" and model.get("byte_fallback"):
        kind, name = "llama", _sentencepiece(content)
    elif model["type"] == "BPE":
        kind, name = "gpt2", _byte_level(content)
    else:
        raise UserError(f"ssmax export gguf takes BPE tokenizers, got {model['type']}")
    _check_added(content)
    special = gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=vocab_size)
    sample, text = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    begins, ends = sample[:1] == [tokenizer.bos_token_id], sample[-1:] == [tokenizer.eos_token_id]
    if sample != [tokenizer.bos_token_id] * begins + text + [tokenizer.eos_token_id] * ends:
        raise UserError(f"llama.cpp adds bos and eos alone to a text; this tokenizer makes {sample} of the ids {text}")
    special.add_special_token = {
        "bos": begins,
        "eos": ends,
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
    sort = "SentencePiece-like" if kind == "llama" else "byte-level"
    return f"a {sort} tokenizer of {len(tokenizer):,} tokens ({name}){_limits(content)}"


def _limits(content):
    """Return what llama.cpp reads in another way, for the user."""
    scheme = (content.get("pre_tokenizer") or {}).get("prepend_scheme")
    if scheme == "first":
        return "; llama.cpp adds a space before text that begins with a space or follows a special token, transformers does not"
    if scheme == "always":
        return "; llama.cpp adds a space before text that begins with a space, transformers does not"
    return "; llama.cpp does not compose accents (NFC), transformers does" if content.get("normalizer") == NFC else ""


def _check_added(content):
    for token in content.get("added_tokens", []):
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        flags += ["normalized"] * bool(
            token.get("normalized") and not token.get("special") and content["model"].get("byte_fallback")
        )
        if flags:
            raise UserError(
                f"llama.cpp would split texts differently: the token {token['content']!r} has the option {flags[0]}"
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
    if normalizer is not None and not (name == "qwen2" and normalizer == NFC):
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
    others = [
        step
        for step in steps
        if (step.get("type") == "Replace" and step.get("pattern") != {"String": " "})
        or (step.get("type") == "Prepend" and step.get("prepend") != "▁")
    ]
    if not (by_normalizer or by_metaspace) or marks != {"▁"} or others:
        raise UserError("llama.cpp would split texts differently from this tokenizer, which is not a SentencePiece BPE")
    missing = _unlisted(content["model"])
    if missing:
        raise UserError(
            f"llama.cpp would merge {missing[0]!r} and {missing[1]!r}, which this tokenizer does not merge, or merges at another time"
        )
    return "default"


def _unlisted(model):
    """Return two neighbours that llama.cpp would merge at another time, or None. It merges what gives the best token, whatever its parts."""
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    made = [left + right for left, right in merges]
    spans = {}
    for rank, token in enumerate(made):
        first, _, count = spans.get(token, (rank, rank, 0))
        spans[token] = (first, rank, count + 1)
    for token in model["vocab"]:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in model["vocab"] and pair[1] in model["vocab"] and pair not in ranks:
                return pair
    apart = next((token for token, (first, last, count) in spans.items() if last - first >= count), None)
    return None if apart is None else tuple(merges[spans[apart][1]])


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
