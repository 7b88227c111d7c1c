"""Retrieval tasks under each kind of tokenizer: a model that copies perfectly finds everything."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from ssmax.evaluation import ABCDigits, NeedleTask, PromptForm

TEXT = "Some plain words that stand around what is asked, line by line.\n" * 60
ASCII = [chr(i) for i in range(33, 127)]
CHAT = "<s>[INST] {{ messages[0].content }} [/INST]"


def fast(core, **options):
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT} | options
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


def vocabulary(*more):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *ASCII, "▁", "▁▁", *more]
    return {piece: index for index, piece in enumerate(pieces)}


def byte_level(*merges):
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, list(merges)))
    # Without a regular expression nothing keeps a merge from crossing words.
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    core.decoder = decoders.ByteLevel()
    return fast(core)


def sentencepiece(normalizer=None, pre_tokenizer=None, merges=(("▁", "▁"),)):
    made = vocabulary(*("".join(merge) for merge in merges if "".join(merge) != "▁▁"))
    core = Tokenizer(models.BPE(made, list(merges), unk_token="<unk>", byte_fallback=True))
    if normalizer is not None:
        core.normalizer = normalizers.Sequence([normalizer, normalizers.Replace(" ", "▁")])
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(core)


def unigram():
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("\n", -2.0), ("▁▁", -2.5), ("10", -2.5)]
    core = Tokenizer(models.Unigram(pieces + [(c, -3.0) for c in ASCII], unk_id=0))
    core.normalizer = normalizers.Sequence([normalizers.Replace("\n", " "), normalizers.Strip()])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return fast(core)


def word_piece():
    words = ["<unk>", "<s>", "</s>", *ASCII, *(f"##{c}" for c in ASCII), *(f"{i:02d}" for i in range(100))]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return fast(core)


TOKENIZERS = {
    "byte level": byte_level,
    "Prepend": lambda: sentencepiece(normalizers.Prepend("▁")),
    "LlamaTokenizer": lambda: LlamaTokenizer(vocab=vocabulary(), merges=[("▁", "▁")], chat_template=CHAT),
    **{
        f"Metaspace {scheme}": lambda scheme=scheme: sentencepiece(
            pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme)
        )
        for scheme in ("first", "always", "never")
    },
    "no split": lambda: sentencepiece(normalizers.Prepend("▁"), merges=[(":", "▁"), ("=", "4"), ("2", ".")]),
    "space with digit": lambda: byte_level(*(("Ġ", str(i)) for i in range(10))),
    "colon with space": lambda: byte_level((":", "Ġ")),
    "colon with space and digit": lambda: byte_level((":", "Ġ"), *((":Ġ", str(i)) for i in range(10))),
    "equals with digit": lambda: byte_level(*(("=", str(i)) for i in range(10))),
    "digit with what follows": lambda: byte_level(*((str(i), end) for i in range(10) for end in (".", "Ċ"))),
    "newline with letter": lambda: byte_level(*(("Ċ", letter) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")),
    "period with newline": lambda: byte_level((".", "Ċ")),
    "pairs of digits": lambda: byte_level(*((str(i), str(j)) for i in range(10) for j in range(10))),
    "Unigram": unigram,
    "WordPiece": word_piece,
}
TASKS = {
    "needle": lambda encode, text, form: NeedleTask(encode, text, form=form),
    "several": lambda encode, text, form: NeedleTask(encode, text, several=True, form=form),
    "distractors": lambda encode, text, form: NeedleTask(encode, text, distractors=2, form=form),
    "abc": lambda encode, text, form: ABCDigits(encode, form=form),
}


def copied(tokens, count):
    """What a perfect copier says: what followed the latest earlier place that ends with the same tokens."""
    said = list(tokens)
    for _ in range(count):
        for size in range(60, 0, -1):
            at = [i for i in range(len(said) - size) if said[i : i + size] == said[-size:]]
            if at:
                break
        said.append(said[at[-1] + size])
    return said[len(tokens) :]


def has_seen_it(kind, task, style, depth):
    """Whether the context holds the prompt's last tokens: no copier of tokens knows how to go on where it does not."""
    if task != "abc":
        return True
    if kind == "newline with letter":
        return style == "base" and depth > 0  # the first line has no newline before it, nor has a chat's reply
    return style == "base" or kind not in ("no split", "equals with digit")  # a letter stands in the question as well


@pytest.mark.parametrize("style", ["base", "chat"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_perfect_copier_is_right_and_the_span_is_the_needle(kind, task, style, record):
    tokenizer = TOKENIZERS[kind]()

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def spell(ids):
        return "".join(tokenizer.decode(ids).split()).replace("##", "").lower()

    form = PromptForm.of(tokenizer, style)
    made = TASKS[task](encode, np.array(encode(TEXT)), form)
    for seed in range(3):
        for (_, depth), example in made.grid([(900, 0.0), (900, 0.5)], np.random.default_rng(seed)).items():
            if has_seen_it(kind, task, style, depth):
                assert copied(example.prompt, len(example.answer)) == example.answer
            needle = spell(example.prompt[slice(*example.span)])
            number = "".join(c for c in needle if c.isdigit())
            assert len(number) == (6 if task == "abc" else 7)
            assert number in spell(example.answer)
            asked = needle.split(number)[0].strip()
            assert spell(example.prompt + example.answer).rstrip(".").endswith(asked.lstrip() + number)
            first = spell(example.answer[: example.first])
            assert number[0] in first
            assert not any(c.isdigit() for c in spell(example.answer[: example.first - 1]))
            assert example.prompt[: len(form.head)] == list(form.head)
            assert len(example.prompt) + len(example.answer) <= 900
    record("a needle's answer in the tokens of another kind of tokenizer", 3)


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "digit with what follows"])
def test_prompt_and_answer_are_the_tokens_of_one_text(kind):
    tokenizer = TOKENIZERS[kind]()

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    form = PromptForm.of(tokenizer, "base")
    for example in ABCDigits(encode, form=form).grid([(300, 0.3)], np.random.default_rng(1)).values():
        text = tokenizer.decode(example.prompt + example.answer, skip_special_tokens=True)
        if kind not in ("Unigram", "WordPiece"):  # whose decoding loses spaces and case
            text = text.removeprefix(" ")
            assert [*form.head, *encode(text)] == example.prompt + example.answer


def test_a_tokenizer_without_digits_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "the": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    def encode(text):
        return tokenizer.encode(text).ids

    for task in (NeedleTask(encode, np.zeros(500, dtype=int)), ABCDigits(encode)):
        with pytest.raises(ValueError, match="lacks digits"):
            task.grid([(200, 0.5)], np.random.default_rng(0))
