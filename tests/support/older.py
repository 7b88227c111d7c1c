"""Writes the checkpoints in tests/golden/checkpoints, which every later version reads; run by hand, with an older commit's package."""

import json
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import ssmax

SHAPE = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.arange(12)[None] % 17


def llama():
    return LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=32))


def bert():
    return BertForMaskedLM(BertConfig(**SHAPE, max_position_embeddings=32))


KINDS = {
    "learned": lambda: ssmax.convert(llama(), 0.5, layers=[1]),
    "bias": lambda: ssmax.convert(llama(), "identity"),
    "folded": lambda: ssmax.fold(ssmax.convert(llama(), "matched")),
    "fixed": lambda: ssmax.convert(llama(), law="yarn", law_parameters={"factor": 40.0}),
    "networks": lambda: ssmax.convert(llama(), law="query-aware", law_parameters={"hidden_size": 4}),
    "encoder": lambda: ssmax.convert(bert(), "matched"),
}


def main(folder):
    for name, make in KINDS.items():
        torch.manual_seed(0)
        model = make().eval()
        for parameter in (p for key, p in model.named_parameters() if ".ssmax." in key and name != "folded"):
            parameter.data.add_(torch.linspace(0, 0.5, parameter.numel()).view_as(parameter))
        model.save_pretrained(folder / name)
        logits = model(TOKENS).logits[0, -1].tolist()
        (folder / name / "logits.json").write_text(json.dumps(logits))
        for extra in ("README.md", "generation_config.json"):
            (folder / name / extra).unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
