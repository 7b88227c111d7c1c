"""The cost of a recipe: parameters, tokens, memory and time, from its fields and one measured step."""

import time
from functools import partial
from typing import Any

import numpy as np
import torch

from ssmax.data.shards import SHARD_TOKENS, token_type
from ssmax.data.tokenizer import load_given_tokenizer, vocabulary
from ssmax.errors import UserError
from ssmax.paper.building import build_model, switch_at
from ssmax.paper.models import VARIANTS
from ssmax.paper.recipes import Recipe
from ssmax.paper.stages import finetune_step_tokens
from ssmax.training.loop import batch_arguments
from ssmax.training.ranks import world_size

H100 = 989e12 * 0.4  # dense bfloat16 FLOP/s of the data sheet, times a usual utilisation
TIMED_STEPS = 3  # steps that are timed; the fastest counts
ENOUGH = 1024  # tokens of such a step, so that it is short at the paper's size too


def plan(recipe: Recipe) -> list[str]:
    """Return lines that say what the recipe trains and what it costs. A few small steps are run to measure the time.

    Raises:
        UserError: the ranks cannot share the batch.
    """
    size = _vocabulary(recipe)
    with torch.device("meta"):
        model = build_model(recipe, recipe.jobs[0].form, "b", 0, size)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    scales = sum(count for name, count in sizes.items() if ".ssmax." in name)
    norms = sum(count for name, count in sizes.items() if "norm" in name)
    matrices = sum(sizes.values()) - scales - norms
    trained = [job for job in recipe.jobs if not VARIANTS[job.variant].made_of]
    steps = sum(map(partial(_own_steps, recipe), trained))
    step_tokens = recipe.batch_size * recipe.train_length
    asked = sum("finetune" in recipe.stages(job) for job in recipe.jobs)
    counting = sum("count" in recipe.stages(job) for job in recipe.jobs)
    tuned_steps = asked * recipe.finetune_steps + counting * recipe.count_steps
    tuned_tokens = tuned_steps * finetune_step_tokens(recipe)
    tokens = steps * step_tokens + tuned_tokens
    whole = _training_flops(recipe, matrices, tokens, size)
    ranks, rounds = world_size(), batch_arguments(recipe.batch_size, recipe.device_batch_size)
    windows = rounds["per_device_train_batch_size"]
    rate, device = _measured_rate(recipe, size, windows)
    kept = sum(VARIANTS[job.variant].measured for job in trained) + asked + counting
    return [
        f"recipe {recipe.name}: {len(recipe.jobs)} models, {' '.join(recipe.models)}, seeds {' '.join(map(str, recipe.seeds))}",
        f"parameters: {matrices:,} in matrices, {norms:,} in norms, {scales:,} scales s",
        f"tokens: {step_tokens:,} a step, {steps * step_tokens:,} in {len(trained)} pretrainings; "
        f"about {tuned_tokens:,} in {asked + counting} fine-tunings",
        _data(recipe, size),
        f"a step on {ranks} device{'s' * (ranks > 1)}: {windows} windows of {recipe.train_length:,} tokens at once, "
        f"{rounds['gradient_accumulation_steps']} rounds",
        f"memory of a device: {_gib(16 * sum(sizes.values()))} weights, gradients and Adam (with --shard over {ranks}: "
        f"{_gib(16 * sum(sizes.values()) / ranks)}); activations about {_gib(_activations(recipe, windows, size))} (estimate)",
        f"disk: {kept} models of {_gib(4 * sum(sizes.values()))}"
        + (
            f", and up to 2 checkpoints of {_gib(12 * sum(sizes.values()))} at a time, every {recipe.checkpoint_steps:,} steps"
            if recipe.checkpoint_steps
            else ", no regular checkpoints inside a training"
        ),
        f"arithmetic of all trainings: {whole:.2e} FLOP",
        f"measured here, {device}: {rate:,.0f} tokens a second, which is "
        f"{_hours(tokens / rate)} for all trainings on this one device",
        f"not measured: one H100 at 40 % of its bfloat16 peak would take {_hours(whole / H100)}",
    ]


def _own_steps(recipe, job):
    """Return the steps that a pretraining takes by itself. It may share those before a switch with another."""
    branch_of = VARIANTS[job.variant].branch_of
    shared = any((job.form, branch_of, job.seed) == (one.form, one.variant, one.seed) for one in recipe.jobs)
    return recipe.steps - switch_at(recipe) * shared


def _vocabulary(recipe):
    """Return the vocabulary of the recipe's tokenizer if that is on this machine; otherwise the recipe's vocab_size."""
    if not recipe.tokenizer:
        return recipe.vocab_size
    try:
        return vocabulary(load_given_tokenizer(recipe.tokenizer, cached_only=True).core)
    except UserError:
        return recipe.vocab_size


def _data(recipe, size):
    if not recipe.tokenizer:
        return f"data: up to {recipe.corpus_bytes:,} bytes of text, held in memory while a tokenizer is trained on it"
    tokens, width = recipe.prepared_tokens, np.dtype(token_type(size)).itemsize
    shards = -(-tokens // SHARD_TOKENS)
    windows = min(tokens // recipe.train_length, recipe.steps * recipe.batch_size)
    return (
        f"data: {tokens:,} tokens by the tokenizer {recipe.tokenizer}, {shards:,} shard{'s' * (shards > 1)} of "
        f"{_gib(min(tokens, SHARD_TOKENS) * width)}, {_gib(tokens * width)} on disk; a rank holds {_gib(4 * windows)} for their order"
    )


def _training_flops(recipe, matrices, tokens, vocabulary):
    """Return FLOP: six for each token and parameter, without the input embedding, and causal attention over the window."""
    attention = 6 * recipe.num_layers * recipe.hidden_size * recipe.train_length
    return tokens * (6 * (matrices - vocabulary * recipe.hidden_size) + attention)


def _activations(recipe, windows, vocabulary):
    """Return the bytes kept for the backward with fused attention: about 34 for each hidden unit, and float32 logits."""
    tokens = windows * recipe.train_length
    width = 1 if recipe.precision == "bfloat16" else 2
    return tokens * (recipe.num_layers * 34 * recipe.hidden_size * width + 8 * vocabulary)


def _measured_rate(recipe, vocabulary, windows):
    """Return the tokens a second of forward, backward and AdamW on some windows of a step, and the device's name."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model: Any = build_model(recipe, recipe.jobs[0].form, "b", 0, vocabulary)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    some = max(1, min(windows, ENOUGH // recipe.train_length))
    tokens = torch.zeros(some, recipe.train_length, dtype=torch.long, device=device)
    times = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16" and on_gpu):
            model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads, float32"
    return tokens.numel() / min(times), name


def _gib(size):
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _hours(seconds):
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"
