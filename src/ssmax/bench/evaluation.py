"""The time of measuring a model: loss by position over a plain forward, and grids cell by cell over shared prefixes."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from ssmax.bench.measure import PLAIN, Comparison, largest_error
from ssmax.evaluation import ABCDigits, NeedleTask, loss_by_position, retrieve, retrieve_grid
from ssmax.evaluation.retrieval import grid_tokens
from ssmax.evaluation.tasks import depth_grid

# 6 of the 30 layers of SmolLM2-135M, with its vocabulary.
VOCABULARY = 49_152
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS, DOUBLED = (500, 1000, 1500, 2000, 2500), (160, 320, 640, 1280, 2560)


def measurements() -> Iterator[Comparison]:
    """A random Llama of 6 layers: loss by position, then the grid of lengths and depths of each task."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=8192, **SHAPE)
    model = LlamaForCausalLM(config).eval()
    for length, repeats in ((2048, 10), (4096, 6)):
        tokens = torch.randint(0, VOCABULARY, (1, length + 1), generator=torch.Generator().manual_seed(0))
        plain, ours = (functools.partial(call, model, tokens) for call in (_plain_loss, loss_by_position))
        calls: dict[str, Callable[[], Any]] = {PLAIN: plain, "loss by position": ours}
        errors: dict[str, Callable[[], float]] = {
            "loss by position": lambda plain=plain, ours=ours: largest_error(ours(), plain())
        }
        yield Comparison({"length": length}, calls, repeats, errors, memory=True)
    haystack = np.random.default_rng(0).integers(32, 126, 8192)
    grids = {
        "needle": (NeedleTask(_encode, haystack), STEPS),
        "needle, sizes doubled": (NeedleTask(_encode, haystack), DOUBLED),
        "several needles": (NeedleTask(_encode, haystack, several=True), STEPS),
        "needle, 3 distractors": (NeedleTask(_encode, haystack, distractors=3), STEPS),
        "26 letters": (ABCDigits(_encode), STEPS),
    }
    for name, (task, lengths) in grids.items():
        grid = task.grid(depth_grid(lengths, DEPTHS), np.random.default_rng(0))
        calls: dict[str, Callable[[], Any]] = {
            "shared prefixes": functools.partial(retrieve_grid, model, [grid], chunk=1024),
            "cell by cell": functools.partial(_cell_by_cell, model, grid),
        }
        tokens_of = sum(len(example.prompt) - 1 for example in grid.values()) / grid_tokens([grid])
        at = {"grid": name, "cells": len(grid), "tokens": round(tokens_of, 2)}
        yield Comparison(at, calls, 3, base="shared prefixes")


@torch.inference_mode()
def _plain_loss(model, tokens):
    logits = model(tokens[:, :-1], use_cache=False).logits
    return cross_entropy(logits[0], tokens[0, 1:], reduction="none")[None]


def _cell_by_cell(model, grid):
    return [retrieve(model, [example], chunk=1024) for example in grid.values()]


def _encode(text):
    return [ord(character) for character in text]
