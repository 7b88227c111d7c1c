"""A converted checkpoint through lm-evaluation-harness, unchanged: the RULER tasks that need no download."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ssmax

pytest.importorskip("lm_eval", reason="make test-harness installs lm-evaluation-harness and runs this")


def test_ruler_on_a_converted_checkpoint(tmp_path):
    words = [
        "<unk>",
        "<eos>",
        *[
            "VAR",
            "=",
            "What",
            "is",
            "the",
            "value",
            "of",
            "?",
            "the",
            "grass",
            "is",
            "green",
            "The",
            "sky",
            "blue",
            "sun",
            "yellow",
        ],
    ]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **shape))
    ssmax.convert(model, 0.3).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "ruler_vt,ruler_fwe", "--limit", "1"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True", "--device", "cpu"]
    command += ["--metadata", '{"max_seq_lengths": [1024]}', "--output_path", str(tmp_path / "out")]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    assert set(results) == {"ruler_vt", "ruler_fwe"}
    for scores in results.values():
        assert 0 <= scores["1024,none"] <= 1
