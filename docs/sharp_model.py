"""Trains a small SSMax model whose heads are sharp, for ssmax bench generate: python docs/sharp_model.py FOLDER [PRICE].

It has EXAONE 4's form: layers with a window and RoPE, and layers with full attention, SSMax and no position encoding, so that it
reads texts of any length. The loss is the cross entropy plus PRICE times the entropy of full attention, in units of log n. With
PRICE 0 it is an ordinary SSMax model. A quarter of an hour on one CPU core.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Exaone4Config, Exaone4ForCausalLM

from ssmax.conversion import convert
from ssmax.data.corpus import load
from ssmax.data.tokenizer import wrapped
from ssmax.nn import parameter_groups
from ssmax.paper.recipes import tiny
from ssmax.paper.reproduce import tokenise
from ssmax.runs.files import check_destination

RECIPE = dataclasses.replace(tiny(), train_length=256, batch_size=16, steps=600)
CONTEXT = 131_072 + 1024  # the longest that it will read
LAYERS = ["sliding_attention", "full_attention", "full_attention"]
RATE = 2e-3


def build(vocab_size, end):
    """Return a new model."""
    torch.manual_seed(0)
    config = Exaone4Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        layer_types=LAYERS,
        sliding_window=64,
        sliding_window_pattern=None,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": RECIPE.rope_theta},
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,
        attn_implementation="eager",  # which returns attention
    )
    return convert(Exaone4ForCausalLM(config), "matched", train_length=RECIPE.train_length)


def entropy(attentions):
    """Return the entropy of each row of attention over log n, mean over layers with full attention, heads, and rows of 16 keys or more."""
    log_n = torch.arange(1, RECIPE.train_length + 1).log()[15:]
    # The small number keeps the gradient finite at weights of 0.
    full = [a for a, kind in zip(attentions, LAYERS, strict=True) if kind == "full_attention"]
    return torch.stack([(-(a * (a + 1e-9).log()).sum(-1)[..., 15:] / log_n).mean() for a in full]).mean()


def rate(step):
    """Return the factor of the learning rate: a warm-up of 50 steps, and a linear fall over the last third."""
    return min((step + 1) / 50, 1.0, (RECIPE.steps - step) / (RECIPE.steps / 3))


def train(price):
    """Return the trained model and the corpus."""
    tokens, _ = tokenise(RECIPE, None, Path("runs/cache"))
    corpus = load(tokens)
    model = build(corpus.vocab_size, corpus.end)
    optimizer = torch.optim.AdamW(parameter_groups(model, RATE, RECIPE.weight_decay), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng = np.random.default_rng(0)
    torch.set_flush_denormal(True)  # sharp weights underflow, and numbers below 1e-38 are slow
    bar = tqdm(range(RECIPE.steps))
    for step in bar:
        starts = rng.integers(0, len(corpus.train) - RECIPE.train_length - 1, RECIPE.batch_size)
        windows = np.stack([corpus.train[start : start + RECIPE.train_length + 1] for start in starts])
        ids = torch.from_numpy(windows.astype(np.int64))
        output = model(ids[:, :-1], output_attentions=price > 0, use_cache=False)
        loss = cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten())
        spread = entropy(output.attentions) if price > 0 else torch.tensor(0.0)
        optimizer.zero_grad()
        (loss + price * min(1.0, step / 200) * spread).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", entropy=f"{spread.item():.3f}")
    return model, corpus


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    check_destination(folder, new=True)
    model, corpus = train(float(sys.argv[2]) if len(sys.argv) > 2 else 0.3)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    wrapped(corpus.tokenizer).save_pretrained(folder)
