"""Converted models in mlx-lm, by the file that saved models carry: logits and greedy tokens against transformers. make test-mlx.

Random models in float32, s and b of each head between 0.1 and 0.9. Prompts of 3 to 700 tokens: logits of the whole prompt, and 24 greedy
tokens with mlx-lm's cache, the prompt read in chunks of 64. All prompts again as one batch of mlx-lm. Softmax must give other tokens.
"""

import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import torch
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.utils import load_model
from transformers import AutoConfig, AutoModelForCausalLM

import ssmax

SHAPE = {
    "vocab_size": 300,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 256, "rope_theta": 5e5}
CASES = {
    "Llama": ("llama", {}, {}),
    "Llama with b, two of three layers, RoPE of Llama 3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, {"bias": True, "layers": [0, 2]}),
    "Qwen 2 with b": ("qwen2", {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}, {"bias": True}),
    "Qwen 3": ("qwen3", {"head_dim": 16}, {}),
    "Qwen 3 with b": ("qwen3", {"head_dim": 16}, {"bias": True}),
    "Mistral": ("mistral", {"sliding_window": None}, {}),
    "Mistral with windows and b": ("mistral", {"sliding_window": 40}, {"bias": True, "layers": [0, 1, 2]}),
}  # fmt: skip
LENGTHS, NEW, BOUND = (3, 17, 130, 700), 24, 1e-3


def greedy(model, prompt):
    """Greedy tokens of transformers."""
    tokens = torch.tensor([prompt])
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False)
    return found[0, len(prompt) :].tolist()


def batched(model, prompts):
    """Greedy tokens of mlx-lm, the prompts in one batch."""
    generator = BatchGenerator(model, max_tokens=NEW)
    names, found = generator.insert(prompts), {}
    while len(replies := generator.next_generated()):
        for reply in replies:
            found.setdefault(reply.uid, []).append(reply.token)
    return [found[name] for name in names]


def run(name, family, changes, options) -> bool:
    """Print what one case gives; return whether all is as it should be."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | changes)).eval()
    ssmax.convert(model, 0.5, **options)
    for key, parameter in model.named_parameters():
        if ".ssmax." in key:
            parameter.data.uniform_(0.1, 0.9)
    prompts = [torch.randint(3, 300, (size,)).tolist() for size in LENGTHS]
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        mlx_model, _ = load_model(Path(place), trust_remote_code=True)
    largest, equal = 0.0, []
    wanted = [greedy(model, prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, wanted, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits
        got = torch.tensor(mlx_model(mx.array([prompt])).tolist())
        assert got.isfinite().all(), "a logit is not a number"
        largest = max(largest, float((got - logits).abs().max()))
        steps = generate_step(mx.array(prompt), mlx_model, max_tokens=NEW, prefill_step_size=64)
        equal.append([token for token, _ in steps] == tokens)
    together = [got == tokens for got, tokens in zip(batched(mlx_model, prompts), wanted, strict=True)]
    softmax = [greedy(ssmax.revert(model) if index == 0 else model, prompt) for index, prompt in enumerate(prompts)]
    other = [got != tokens for got, tokens in zip(softmax, wanted, strict=True)]
    print(f"{name}: {largest:.1e}; tokens equal {sum(equal)} of {len(equal)}, in a batch {sum(together)}; softmax other {sum(other)}", flush=True)  # fmt: skip
    return largest < BOUND and all(equal) and all(together) and any(other)


def main() -> None:
    """Run all cases; exit with 1 where one fails."""
    torch.set_num_threads(1)
    mx.set_default_device(mx.cpu)
    results = [run(name, *case) for name, case in CASES.items()]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
