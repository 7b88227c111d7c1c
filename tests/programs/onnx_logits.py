"""Converted models in ONNX Runtime and OpenVINO, from ssmax export onnx: logits and greedy tokens against transformers. make test-onnx.

Random models, s and b of each head between 0.1 and 0.9. Prompts of 1 to 300 tokens; a batch that is padded on the left; then 8 greedy
steps from the cache, where there is one. Prints the largest difference of a logit and that of plain softmax.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ssmax
from ssmax.serving.onnx import export_onnx

SHAPE = {
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HEAD_SIZE, LENGTHS, BOUND = 8, (1, 2, 17, 300), 1e-3
CASES = {
    "Llama with b": ("llama", LLAMA, {"bias": True}),
    "Qwen 3": ("qwen3", {**LLAMA, "head_dim": HEAD_SIZE}, {}),
    "GPT-2 with b": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, {"bias": True}),
    "OLMo 3 with windows": ("olmo3", {**LLAMA, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}, {"layers": [0, 1]}),
}  # fmt: skip


def feeds(
    names: list[str], tokens: torch.Tensor, mask: torch.Tensor, past: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What a graph takes for the last tokens of sequences whose mask is given; past: its cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    given = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(), **past}
    return {name: given[name] for name in names}


def onnx_runtime(path: Path):
    """Return names of inputs and outputs, and a function from a feed to the outputs."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ins, outs = [value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()]
    return ins, outs, lambda feed: session.run(outs, feed)


def open_vino(path: Path):
    """The same of OpenVINO, in float32."""
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [[sorted(port.names)[0] for port in ports] for ports in (compiled.inputs, compiled.outputs)]
    return *names, lambda feed: [compiled(feed)[index] for index in range(len(names[1]))]


def difference(model, engine, tokens, mask) -> float:
    """Largest difference of a logit: of the prompt, and where there is a cache of 8 greedy steps behind it, whose tokens must be equal."""
    ins, outs, run = engine
    kept = [name for name in ins if "past_key_values" in name]
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    past = {name: np.zeros((len(tokens), heads, 0, HEAD_SIZE), np.float32) for name in kept}
    largest, given = 0.0, tokens
    for _ in range(8):
        found = run(feeds(ins, given, mask, past))
        with torch.no_grad():
            wanted = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        wanted, seen = wanted[:, -given.shape[1] :], mask[:, -given.shape[1] :] > 0
        got = torch.from_numpy(found[outs.index("logits")])
        assert got[seen].isfinite().all(), "a logit is not a number"
        largest = max(largest, float((got - wanted)[seen].abs().max()))
        following = got[:, -1:].argmax(-1)
        assert torch.equal(following, wanted[:, -1:].argmax(-1)), "another token"
        tokens, mask = torch.cat([tokens, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
        past = dict(
            zip(kept, [value for name, value in zip(outs, found, strict=True) if name != "logits"], strict=True)
        )
        given = following if kept else tokens
    return largest


def check_folder(folder: Path, family: str) -> None:
    """The folder names no file that is not there, and its config is known where ssmax is not installed."""
    config = json.loads((folder / "config.json").read_bytes())
    assert config["model_type"] == family
    assert not {"auto_map", "model_file", "ssmax"} & config.keys()
    card = (folder / "README.md").read_text()
    assert "library_name: onnx" in card
    assert "s log n" in card
    assert "_ssmax.py" not in card


def main() -> None:
    """Run all cases; exit with 1 where a difference is too large, or softmax does not differ."""
    failed = False
    for name, (family, changes, options) in CASES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | changes)).eval()
        ssmax.convert(model, 0.5, **options)
        for key, parameter in model.named_parameters():
            if ".ssmax." in key:
                parameter.data.uniform_(0.1, 0.9)
        prompts = [(torch.randint(3, 300, (1, size)), torch.ones(1, size, dtype=torch.long)) for size in LENGTHS]
        padded = torch.randint(3, 300, (3, 40)), torch.ones(3, 40, dtype=torch.long)
        padded[1][0, :25], padded[1][1, :3] = 0, 0
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(f"{place}/model")
            lines = export_onnx(f"{place}/model", Path(place) / "onnx")
            path = Path(place) / "onnx" / "model.onnx"
            check_folder(path.parent, family)
            for engine, made in (("ONNX Runtime", onnx_runtime(path)), ("OpenVINO", open_vino(path))):
                found = [difference(model, made, *batch) for batch in (*prompts, padded)]
                failed |= max(found) > BOUND
                print(f"{lines[0]}, {name}, {engine}: {', '.join(f'{one:.1e}' for one in found)}", flush=True)
        with torch.no_grad():
            logits = model(padded[0]).logits
            other = float((ssmax.revert(model)(padded[0]).logits - logits).abs().max())
        failed |= other < 0.1
        print(f"{name}, softmax instead: {other:.1e}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
