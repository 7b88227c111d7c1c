"""The file for mlx-lm in saved models: written for what it computes exactly, and only for that. make test-mlx runs it."""

import ast
import json
import re

import pytest
import torch
from tiny_models import tiny_model

import ssmax
from ssmax.hf.portable.mlx_file import why_not_mlx

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
WRITTEN = {
    "llama": ("llama", {"rope_parameters": LINEAR}, {"bias": True, "layers": [1]}, "llama"),
    "mistral": ("mistral", {"sliding_window": 4}, {"layers": [0, 1]}, "llama"),
    "qwen2": ("qwen2", {}, {}, "qwen2"),
    "qwen3": ("qwen3", {}, {"bias": True}, "qwen3"),
}
REFUSED = {
    "family": ("gpt2", {}, {}, "none of llama"),
    "law": ("llama", {}, {"law": "ssmax-fixed"}, "law is ssmax-fixed"),
    "windows": ("qwen2", WINDOWS, {"layers": [0, 1]}, "windows of qwen2"),
    "RoPE": ("llama", {"rope_parameters": YARN}, {}, "RoPE is .*yarn"),
    "activation": ("llama", {"hidden_act": "gelu"}, {}, "activation is 'gelu'"),
    "biases": ("qwen3", {"attention_bias": True}, {}, "biases in Qwen 3"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_the_file_is_of_the_family_and_named_in_the_config(case, tmp_path):
    family, changes, options, module = WRITTEN[case]
    model = ssmax.convert(tiny_model(family, **changes), 0.5, **options)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "mlx_ssmax.py").read_text()
    classes = {node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    assert {"Model", "ModelArgs"} <= classes
    assert f"from mlx_lm.models import {module} as family\n" in text
    assert json.loads((tmp_path / "config.json").read_text())["model_file"] == "mlx_ssmax.py"
    assert "mlx_ssmax.py" in (tmp_path / "README.md").read_text()
    assert not hasattr(ssmax.revert(model).config, "model_file")


@pytest.mark.parametrize("case", REFUSED)
def test_what_mlx_lm_would_not_compute_exactly_has_no_file(case, tmp_path):
    family, changes, options, words = REFUSED[case]
    starts = {} if "law" in options else {"init": 0.5}
    model = ssmax.convert(tiny_model(family, **changes), **starts, **options)
    model.config.model_file = "mlx_ssmax.py"  # of the model that it was made from
    assert re.search(words, why_not_mlx(model))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "mlx_ssmax.py").exists()
    assert "mlx_ssmax.py" not in (tmp_path / "README.md").read_text()
    assert "model_file" not in json.loads((tmp_path / "config.json").read_text())


def test_packed_matrices_have_no_file_though_the_config_does_not_name_them_yet():
    """So does compressed-tensors, which writes the config after the model is saved."""
    model = ssmax.convert(tiny_model("llama"), 0.5)
    model.model.layers[0].mlp.up_proj.register_buffer("weight_packed", torch.zeros(3, dtype=torch.int32))
    assert re.search("it is quantised", why_not_mlx(model))
