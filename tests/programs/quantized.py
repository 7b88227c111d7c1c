"""Converted models whose matrices are quantised, on the CPU. make test-quantized: quantized.py transformers | llm-compressor

make test-serving: quantized.py llm-compressor KIND SOURCE TARGET quantises one checkpoint, which an engine then serves.

transformers: by torchao and bitsandbytes while it loads, and rounded to the nearest in the format of compressed-tensors.
llm-compressor: by its GPTQ and AWQ, which read examples, in the same format.

Each kind: a converted checkpoint is quantised, saved, loaded again, and loaded by the checkpoint's own code where ssmax is not known;
all must give the same logits, and so must the softmax checkpoint that is quantised first and converted then, if no examples are
read. s and b stay as they were.
"""

import itertools
import subprocess
import sys
import tempfile
from functools import partial

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

TOKENS = torch.arange(40).view(2, 20) * 7 % 99
SHAPE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def by_transformers():
    """Return how a folder becomes a quantised model, by name."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    configs = {
        "torchao int8 weights": TorchAoConfig(Int8WeightOnlyConfig()),
        "torchao int8 weights and activations": TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
        "bitsandbytes nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    loads = {name: partial(load, quantization_config=config) for name, config in configs.items()}
    return loads | {"compressed-tensors int4 in groups of 32": rounded_to_int4}


def by_llm_compressor():
    """Return how a folder becomes a quantised model, by name."""
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    torch.Tensor.pin_memory = lambda self: self  # AWQ pins memory for a GPU, also where there is none
    kinds = {}
    for (name, kind), bits in itertools.product({"GPTQ": GPTQModifier, "AWQ": AWQModifier}.items(), (8, 4)):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        groups = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
        kinds[f"{name}, int{bits} in groups of 32"] = partial(calibrated, partial(kind, **groups))
    return kinds


def calibrated(make_recipe, folder):
    """Return the model as llm-compressor leaves it after it read examples."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({str(token): token for token in range(99)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="0")
    examples = torch.randint(99, (16, 32), generator=torch.Generator().manual_seed(1)).tolist()
    data = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * 32} for ids in examples])
    model = load(folder)
    oneshot(
        model=model, dataset=data, recipe=make_recipe(), processor=tokenizer, max_seq_length=32,
        num_calibration_samples=16, shuffle_calibration_samples=False,
    )  # fmt: skip
    return model


def rounded_to_int4(folder):
    """Return the model with int4 matrices, as a calibration of llm-compressor leaves it, before they are packed."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model, args = load(folder), QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=args)}
    config = {"ignore": ["lm_head"], "quantization_status": "frozen", "format": "pack-quantized"}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, **config))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            group = module.weight.detach().unflatten(-1, (-1, 32))
            module.weight_scale.data.copy_(calculate_qparams(group.amin(-1), group.amax(-1), args)[0])
    return model


def save(model, folder):
    """Save a quantised model; matrices that are not packed yet are packed."""
    if not any(hasattr(module, "quantization_scheme") for module in model.modules()):
        model.save_pretrained(folder)
        return
    from compressed_tensors.compressors import ModelCompressor

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def scales(model):
    return {name: value for name, value in model.state_dict().items() if ".ssmax." in name}


def run(name, quantise, reads_examples) -> bool:
    """Print what one kind gives; return whether all is as it should be. Examples are read by softmax or by SSMax, and the
    rounded matrices differ."""
    import ssmax

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with tempfile.TemporaryDirectory() as place:
        folders = [f"{place}/{step}" for step in ("softmax", "converted", "quantised")]
        model.save_pretrained(folders[0])
        plain = logits(model)
        ssmax.convert(model, 0.5, bias=True)
        for value in scales(model).values():
            value.uniform_(0.1, 0.9)
        model.save_pretrained(folders[1])
        save(
            quantise(folders[1]), folders[2]
        )  # unrun: bitsandbytes packs nf4 for the CPU in a forward, and saves that wrongly
        quantised = quantise(folders[1])
        wanted = logits(quantised)
        found = {"saved and loaded": logits(load(folders[2]))}
        if not reads_examples:
            converted = ssmax.convert(quantise(folders[0]), 0.5, bias=True)
            converted.load_state_dict(scales(model), strict=False)
            found["converted afterwards"] = logits(converted)
        subprocess.run([sys.executable, "-W", "ignore", __file__, folders[2], f"{place}/alone.pt"], check=True)
        found["own code"] = torch.load(f"{place}/alone.pt")
    same = all(torch.equal(scales(quantised)[key].cpu(), value) for key, value in scales(model).items())
    equal = {way: torch.equal(got, wanted) for way, got in found.items()}
    exact = logits(model)
    far, softmax = float((wanted - exact).abs().max()), float((plain - exact).abs().max())
    print(
        f"{name}: s and b kept {same}; equal logits {equal}; {far:.2f} from float32, softmax {softmax:.2f}", flush=True
    )
    return same and all(equal.values()) and far < softmax


def main() -> None:
    """Run all kinds; exit with 1 where one fails."""
    if len(sys.argv) > 3:
        import ssmax.hf  # noqa: F401 knows converted checkpoints

        kind, source, target = sys.argv[2:]
        save(by_llm_compressor()[kind](source), target)
        return
    if len(sys.argv) > 2:  # the checkpoint's own code
        sys.modules["ssmax"] = None  # as where it is not installed
        torch.save(logits(load(sys.argv[1], trust_remote_code=True)), sys.argv[2])
        return
    reads_examples = sys.argv[1] == "llm-compressor"
    kinds = by_llm_compressor() if reads_examples else by_transformers()
    results = [run(name, quantise, reads_examples) for name, quantise in kinds.items()]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
