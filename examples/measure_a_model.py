"""Measure a model at long context, before and after conversion: loss by position, needles in text, sharpness of attention."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ssmax
from ssmax.evaluation import NeedleTask, attention_sharpness, binned, loss_by_position, retrieve_grid, rope_theta

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
)
text = np.frombuffer((__doc__ * 40).encode(), dtype=np.uint8).astype(np.int64)
documents = torch.from_numpy(text[:2048]).view(2, 1024)
task = NeedleTask(lambda words: list(words.encode()), haystack=text)  # any tokenizer: a function from text to ids
trials = [task.grid([(512, 0.0), (512, 1.0), (1024, 0.5)], np.random.default_rng(seed)) for seed in range(2)]

for name in ("softmax", "ssmax"):
    if name == "ssmax":
        ssmax.convert(model, "matched")
    with rope_theta(model, 4):  # the paper raises RoPE's theta for contexts beyond the training length
        last = binned(loss_by_position(model, documents))[-1]
        found = [outcome for trial in retrieve_grid(model, trials) for outcome in trial.values()]
        (sharp,) = attention_sharpness(model, documents[0], [1024])
    print(f"{name}: loss at {last.first} to {last.last} {last.mean:.3f} nats ({last.low:.3f} to {last.high:.3f}), "
          f"{sum(x.correct for x in found)} of {len(found)} needles, best needle score "
          f"{max(x.scores.max().item() for x in found):.3f}, entropy / log n {sharp.entropy.mean():.3f}")  # fmt: skip
