"""ssmax export: what llama.cpp would not run exactly is refused in one line, with the way out; the rest make test-llama compares."""

import json
import math
import sys

import pytest
import torch
from gguf import GGUFReader
from tiny_models import tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

import ssmax
from ssmax.errors import UserError
from ssmax.serving.gguf import _divisors, _query_factors, _shift, export_gguf
from ssmax.serving.gguf_tokenizer import _check_merges, add_tokenizer
from ssmax.serving.onnx import export_onnx, sample_inputs

REFUSED = {
    "b": ("llama", {}, {"init": "identity"}, "layer 0 has a bias b.*'matched' instead of 'identity'.*calibrate without b"),
    "QK-norm": ("qwen3", {}, {}, "q_norm .QK-norm."),
    "windows": ("mistral", {"sliding_window": 4}, {"layers": [0, 1]}, "windowed layers"),
    "some layers": ("llama", {}, {"layers": [1]}, "layer 0 is not converted.*convert all"),
    "another law": ("llama", {}, {"law": "qwen-1"}, "layer 0 has law qwen-1"),
    "another family": ("gpt_neox", {}, {}, "family gpt_neox is none of llama, mistral, qwen2"),
    "RoPE": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, {}, "RoPE of type 'dynamic' changes"),
    "activation": ("llama", {"hidden_act": "gelu"}, {}, "activation is 'gelu'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_not_run_exactly_is_refused(case, tmp_path):
    family, changes, options, words = REFUSED[case]
    ssmax.convert(tiny_model(family, **changes), **options).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=words):
        export_gguf(str(tmp_path / "model"), tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out*"))


def test_an_infinite_s_is_refused(tmp_path):
    model = ssmax.convert(tiny_model("llama"))
    model.model.layers[1].self_attn.ssmax.s.data[0] = torch.inf
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="layer 1 has an s that is not finite"):
        export_gguf(str(tmp_path / "model"), tmp_path / "out.gguf")


def test_rope_is_written_as_factors_of_its_frequencies():
    rope = {"rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    model = tiny_model("llama", head_dim=8, rope_parameters={"rope_type": "yarn", **rope})
    frequencies = model.model.rotary_emb.inv_freq
    divided = _divisors(frequencies, 1e4)
    torch.testing.assert_close(1e4 ** (-torch.arange(0, 8, 2) / 8) / divided, frequencies.double())
    assert divided.min() == 1  # the fastest turns as before
    assert round(divided.max().item(), 5) == 8
    converted, factors = _query_factors(ssmax.convert(model, init=0.5))
    assert converted
    assert _query_factors(ssmax.convert(tiny_model("qwen2")))[0]
    # YaRN multiplies queries and keys by 1 + log(factor) / 10 each.
    torch.testing.assert_close(factors[0], torch.full((4,), 0.5 * (1 + math.log(8) / 10) ** 2, dtype=torch.float64))


@pytest.mark.parametrize("s", [1e30, 1e-30])
def test_any_s_fits_in_half_precision(s):
    rows = torch.tensor([[0.3, -0.02], [0.1, 0.0]], dtype=torch.float64) * s
    shift = _shift(rows)
    assert 0.5 <= (rows * shift).abs().max() < 1
    assert torch.equal(rows * shift / shift, rows)  # a power of two does not round
    assert _shift(0 * rows) == 1


def sentencepiece(merges=None, **options):
    """A tokenizer like SentencePiece's; by default a token is made from any two others."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "▁▁", "▁a", "ab", "▁▁▁", "▁▁▁▁"]  # fmt: skip
    vocab = {word: index for index, word in enumerate(words)}
    splits = [(word[:cut], word[cut:]) for word in words for cut in range(1, len(word))]
    merges = merges or [(left, right) for left, right in splits if left in vocab and right in vocab]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True, **options))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def with_template(single):
    made = sentencepiece()
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("<unk>", 0)])
    return made


def with_normalizer(*steps):
    made = sentencepiece()
    made.normalizer = normalizers.Sequence(list(steps))
    return made


def with_token(**options):
    made = sentencepiece()
    made.add_tokens([AddedToken("<x>", **options)])
    return made


PREFIX, MARK = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
UNLIKE = {
    "a merge that is not listed": (sentencepiece([("▁", "▁"), ("▁", "a"), ("▁▁", "▁"), ("▁▁", "▁▁"), ("a", "b")]), "merge '▁' and '▁▁'"),
    "a merge at another time": (
        sentencepiece([("▁", "▁▁"), ("a", "b"), ("▁", "a"), ("▁", "▁"), ("▁▁", "▁"), ("▁▁", "▁▁"), ("▁", "▁▁▁"), ("▁▁▁", "▁")]),
        "would split '.*' differently",
    ),
    "a suffix of words": (sentencepiece(end_of_word_suffix="</w>"), "option end_of_word_suffix"),
    "a token at the end": (with_template("<s> $A <unk>"), "adds bos and eos alone"),
    "two tokens at the start": (with_template("<s> <s> $A"), "adds bos and eos alone"),
    "another prefix": (with_normalizer(normalizers.Prepend("▁▁"), MARK), "not a SentencePiece BPE"),
    "another pattern": (with_normalizer(PREFIX, normalizers.Replace(Regex(" +"), "▁")), "not a SentencePiece BPE"),
    "a normalized token": (with_token(), "the token '<x>' has the option normalized"),
    "a token that takes spaces": (with_token(normalized=False, rstrip=True), "the token '<x>' has the option rstrip"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNLIKE)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(case, tmp_path):
    made, words = UNLIKE[case]
    save(made, tmp_path)
    with pytest.raises(UserError, match=words):
        add_tokenizer(None, None, tmp_path, 300)


def save(made, folder):
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.mark.parametrize("made", [sentencepiece(), with_normalizer(MARK, PREFIX), with_token(normalized=False)])
def test_a_tokenizer_like_llamas_passes_the_checks(made, tmp_path):
    save(made, tmp_path)
    with pytest.raises(AttributeError, match="TokenType"):  # of the package gguf, which writes after the checks
        add_tokenizer(None, None, tmp_path, 300)


def test_merges_of_a_token_need_not_be_neighbours():
    """Those of runs of spaces are not in Llama's own tokenizer, and llama.cpp reads them in the same way."""
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁", "▁▁"), ("▁▁", "▁"), ("▁", "▁▁▁"), ("▁▁▁", "▁"), ("▁", "a"), ("a", "b")]
    made = sentencepiece(merges)
    _check_merges(json.loads(made.to_str())["model"], made.model)


@pytest.mark.parametrize("law", ["ssmax", "ssmax-fixed"])
def test_a_dry_run_checks_all_and_writes_nothing(law, tmp_path):
    model, out = ssmax.convert(tiny_model("llama", vocab_size=300), law=law), tmp_path / "new" / "out.gguf"
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        export_gguf(str(tmp_path / "model"), out, dry_run=True)
    save(UNLIKE["a suffix of words"][0], tmp_path / "model")
    with pytest.raises(UserError, match="option end_of_word_suffix"):
        export_gguf(str(tmp_path / "model"), out, dry_run=True)
    save(sentencepiece(), tmp_path / "model")
    told = export_gguf(str(tmp_path / "model"), out, dry_run=True)
    assert "s log n in 2 layers, matrices in f16, a SentencePiece-like tokenizer" in told[0]
    assert not out.parent.exists()
    assert export_gguf(str(tmp_path / "model"), out)[0] == told[0]
    tensors = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    assert tensors["blk.1.attn_q.scale"].n_elements == 1
    assert [path.name for path in out.parent.iterdir()] == ["out.gguf"]
    with pytest.raises(UserError, match="exists already"):
        export_gguf(str(tmp_path / "model"), out)


def test_onnx_has_a_cache_where_all_layers_attend_in_full():
    windows = {"num_hidden_layers": 4, "sliding_window": 5}
    for family, changes, cached in (("llama", {}, True), ("olmo3", windows, False)):
        assert ("past_key_values" in sample_inputs(ssmax.convert(tiny_model(family, **changes)))) == cached
    for family in ("mamba", "openai-gpt"):  # without such a cache at all
        model = tiny_model(family)
        model(**sample_inputs(model))


def test_onnx_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    ssmax.convert(tiny_model("llama")).save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"'onnx.*is missing.*export"):
            export_onnx(str(tmp_path / "model"), tmp_path / "out", dry_run=dry_run)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UserError, match="exists already"):
        export_onnx(str(tmp_path / "model"), tmp_path / "model")
