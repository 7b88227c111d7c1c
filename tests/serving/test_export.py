"""ssmax export: what llama.cpp would not run exactly is refused in one line, with the way out; the rest make test-llama compares."""

import math
import re
import sys

import pytest
import torch
from tiny_models import tiny_model

import ssmax
from ssmax.errors import UserError
from ssmax.serving.gguf import _divisors, _query_factors, export_gguf
from ssmax.serving.onnx import export_onnx

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
    # YaRN multiplies queries and keys by 1 + log(factor) / 10 each.
    torch.testing.assert_close(factors[0], torch.full((4,), 0.5 * (1 + math.log(8) / 10) ** 2, dtype=torch.float64))


def test_what_it_runs_passes_the_checks(tmp_path):
    for family, law in (("llama", "ssmax"), ("qwen2", "ssmax"), ("llama", "ssmax-fixed")):
        ssmax.convert(tiny_model(family), law=law).save_pretrained(tmp_path / law / family)
        lines = export_gguf(str(tmp_path / law / family), tmp_path / "out.gguf", dry_run=True)
        assert re.search("s log n in 2 layers", lines[0])
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export_gguf(str(tmp_path / law / family), tmp_path / "out.gguf")


def test_onnx_has_a_cache_where_all_layers_attend_in_full(tmp_path):
    windows = {"num_hidden_layers": 4, "sliding_window": 5}
    for family, changes, words in (("llama", {}, "with a KV cache"), ("olmo3", windows, "without a KV cache")):
        ssmax.convert(tiny_model(family, **changes)).save_pretrained(tmp_path / family)
        lines = export_onnx(str(tmp_path / family), tmp_path / "out", dry_run=True)
        assert words in lines[0]
    assert not (tmp_path / "out").exists()


def test_onnx_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    ssmax.convert(tiny_model("llama")).save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"'onnx.*is missing.*export"):
        export_onnx(str(tmp_path / "model"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UserError, match="exists already"):
        export_onnx(str(tmp_path / "model"), tmp_path / "model")
