"""Export of tokenizers to GGUF: only those that llama.cpp reproduces exactly."""

import itertools
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
# SentencePiece's steps: a mark for each space, and one before the text.
MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREFIX = {"type": "Prepend", "prepend": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
NFC = {"type": "NFC"}


def add_tokenizer(writer: Any, gguf: Any, folder: Path, vocab_size: int) -> str:
    """Add the tokenizer in a model's folder to a GGUF writer, and return a short description of it.

    Raises:
        UserError: the folder has no tokenizer, or llama.cpp would split texts differently.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; a GGUF file carries its tokenizer")
    with user_errors():
        tokenizer = load_tokenizer(folder)
    # Its class may split texts in another way than the file says.
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    kind, name = _kind(content)
    if kind == "llama":
        _check_merges(model, tokenizer.backend_tokenizer.model)
    _check_added(content, kind)
    ends = _ends(tokenizer)
    tokens, types = _tokens(gguf, tokenizer, content, vocab_size)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores(_scores(tokens, model))
        writer.add_add_space_prefix(_prepends(content))
    special = gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=vocab_size)
    special.add_special_token = ends
    special.add_to_gguf(writer, quiet=True)
    sort = "SentencePiece-like" if kind == "llama" else "byte-level"
    return f"a {sort} tokenizer of {len(tokenizer):,} tokens ({name}){_limits(content)}"


def _kind(content):
    """Return llama.cpp's names of a tokenizer's model and of its way to split texts."""
    model = content["model"]
    if model["type"] != "BPE":
        raise UserError(f"ssmax export gguf takes BPE tokenizers, got {model['type']}")
    for option in ("end_of_word_suffix", "continuing_subword_prefix", "dropout"):
        if model.get(option):
            raise UserError(f"llama.cpp would split texts differently: the tokenizer's model has the option {option}")
    return ("llama", _sentencepiece(content)) if model.get("byte_fallback") else ("gpt2", _byte_level(content))


def _ends(tokenizer):
    """Return whether a text gets bos and eos, which are all that llama.cpp adds."""
    text, alone = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    ends = {"bos": text[:1] == bos, "eos": text[-1:] == eos}
    if text != bos * ends["bos"] + alone + eos * ends["eos"]:
        raise UserError(f"llama.cpp adds bos and eos alone to a text; this tokenizer makes {text} of the ids {alone}")
    return ends


def _limits(content):
    """Return what llama.cpp reads in another way, for the user."""
    scheme = (content.get("pre_tokenizer") or {}).get("prepend_scheme")
    if scheme == "first":
        return "; llama.cpp adds a space before text that begins with a space or follows a special token, transformers does not"
    if scheme == "always":
        return "; llama.cpp adds a space before text that begins with a space, transformers does not"
    return "; llama.cpp does not compose accents (NFC), transformers does" if content.get("normalizer") == NFC else ""


def _check_added(content, kind):
    """Raise UserError if an added token is found in another way than by its text, before all else."""
    for token in content.get("added_tokens", []):
        # A SentencePiece-like normalizer changes spaces, before tokens are found that are normalized.
        options = (
            "lstrip",
            "rstrip",
            "single_word",
            *(["normalized"] if kind == "llama" and not token.get("special") else []),
        )
        found = next((option for option in options if token.get(option)), None)
        if found:
            raise UserError(
                f"llama.cpp would split texts differently: the token {token['content']!r} has the option {found}"
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
    normalizer, before = content.get("normalizer"), content.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    by_normalizer = before is None and steps in ([MARK], [PREFIX, MARK], [MARK, PREFIX])
    by_metaspace = not steps and before == {**METASPACE, "prepend_scheme": (before or {}).get("prepend_scheme")}
    if not (by_normalizer or by_metaspace):
        raise UserError("llama.cpp would split texts differently from this tokenizer, which is not a SentencePiece BPE")
    return "default"


def _check_merges(model, bpe):
    """Raise UserError if llama.cpp may merge in another way. It merges any two neighbours that make a token, best token first.

    If the merges of a token are not neighbours in the list, both ways are tried on it and on what is
    made between them.
    """
    words, scores, merges = model["vocab"], _ranks(model), _merges(model)
    listed, ranks = set(merges), {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
    for word in words:
        for pair in ((word[:cut], word[cut:]) for cut in range(1, len(word))):
            if pair[0] in words and pair[1] in words and pair not in listed:
                raise UserError(
                    f"llama.cpp would merge {pair[0]!r} and {pair[1]!r}, which this tokenizer does not merge"
                )
    for word, own in ranks.items():
        others = {"".join(merges[rank]) for rank in range(own[0], own[-1]) if rank not in own} if len(own) > 1 else ()
        for text in (text for other in others for text in (word + other, other + word)):
            if _merged(text, scores) != [token.value for token in bpe.tokenize(text)]:
                raise UserError(f"llama.cpp would split {text!r} differently from this tokenizer")


def _merged(text, ranks):
    """Return the tokens of a text as llama.cpp merges it: the best pair first, of equal ones the leftmost."""
    parts = list(text)
    while True:
        pairs = [
            (ranks[left + right], at)
            for at, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in ranks
        ]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _prepends(content):
    steps = (content.get("normalizer") or {}).get("normalizers", [content.get("normalizer") or {}])
    scheme = (content.get("pre_tokenizer") or {}).get("prepend_scheme")
    return any(step.get("type") == "Prepend" for step in steps) or scheme in ("first", "always")


def _merges(model):
    """Return the pairs of tokens that a model merges, the first ones first. Older files hold them as texts."""
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]


def _ranks(model):
    """Return the first merge that makes each token, by its place in the list."""
    ranks = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    return ranks


def _scores(tokens, model):
    """Return a score for each token: the earlier the merge that makes it, the higher."""
    ranks = _ranks(model)
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
