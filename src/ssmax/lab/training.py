"""Models, data order and optimizer: the paper's Table 1 to 3 by transformers' Trainer."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import ssmax
from ssmax.errors import RunFailed, UserError
from ssmax.evaluation import NeedleTask
from ssmax.hf import parameter_groups
from ssmax.lab.recipes import Recipe

__all__ = ["Examples", "Windows", "build_model", "finetune", "pretrain"]

FORMS: dict[str, tuple[Any, Any]] = {
    "paper": (LlamaConfig, LlamaForCausalLM),
    "qk-norm": (Qwen3Config, Qwen3ForCausalLM),
}


class Windows(Dataset):
    """The training stream cut into windows, in an order that depends on the seed alone."""

    def __init__(self, tokens: np.ndarray, length: int, count: int, seed: int):
        available = len(tokens) // length
        if available == 0:
            raise UserError(
                f"the training text has {len(tokens)} tokens, less than one window of {length}; give more text"
            )
        rng = np.random.default_rng(seed)
        epochs = math.ceil(count / available)
        self.order = np.concatenate([rng.permutation(available) for _ in range(epochs)])[:count]
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = int(self.order[index]) * self.length
        window = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        return {"input_ids": window, "labels": window}


class Examples(Dataset):
    """Retrieval examples no longer than the training length, longer ones as the training goes on; loss on the answer."""

    def __init__(self, task: NeedleTask, recipe: Recipe, seed: int):
        self.task, self.recipe, self.seed = task, recipe, seed
        self.shortest = task.shortest + 8
        if self.shortest > recipe.train_length:
            raise UserError(
                f"a retrieval example has at least {self.shortest} tokens and the training window only {recipe.train_length}; "
                "raise --train-length"
            )

    def __len__(self) -> int:
        return self.recipe.finetune_steps * self.recipe.finetune_batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step = index // self.recipe.finetune_batch_size
        grown = min(1.0, 0.15 + 2 * step / self.recipe.finetune_steps)
        longest = self.shortest + int((self.recipe.train_length - self.shortest) * grown)
        # One length for a batch, one example for an index: nothing depends on who asks, or in which order.
        length = int(np.random.default_rng([self.seed, step]).integers(self.shortest, longest + 1))
        rng = np.random.default_rng([self.seed, step, index])
        example = self.task.example(length, rng.random(), rng)
        tokens = torch.tensor(example.prompt + example.answer)
        labels = tokens.clone()
        labels[: len(example.prompt)] = -100
        return {"input_ids": tokens, "labels": labels}


def build_model(recipe: Recipe, form: str, variant: str, seed: int, vocab_size: int) -> PreTrainedModel:
    """Return a new model of the paper's shape; all variants of a seed have the same weights."""
    config_type, model_type = FORMS[form]
    config = config_type(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        head_dim=recipe.hidden_size // recipe.num_heads,
        max_position_embeddings=recipe.train_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = model_type(config)
    return ssmax.convert(model, "matched") if variant == "b" else model


def pretrain(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: np.ndarray,
    seed: int,
    scratch: Path,
    progress: Callable[[int], None],
) -> list[tuple[int, float]]:
    """Train as in Table 2 and return (step, mean loss since the last entry)."""
    data = Windows(tokens, recipe.train_length, recipe.steps * recipe.batch_size, seed)
    groups = parameter_groups(model, recipe.learning_rate, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    arguments = {
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch_size,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": recipe.warmup_steps,
    }
    return _train(model, data, optimizer, arguments, seed, scratch, progress, recipe.train_length * recipe.batch_size)


def finetune(
    model: PreTrainedModel, recipe: Recipe, task: NeedleTask, seed: int, scratch: Path, progress: Callable[[int], None]
) -> list[tuple[int, float]]:
    """Fine-tune on retrieval as in Table 3 and return (step, mean loss since the last entry)."""
    groups = parameter_groups(model, recipe.finetune_learning_rate, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    arguments = {
        "max_steps": recipe.finetune_steps,
        "per_device_train_batch_size": recipe.finetune_batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.finetune_warmup_steps,
    }
    tokens = recipe.train_length * recipe.finetune_batch_size
    return _train(model, Examples(task, recipe, seed), optimizer, arguments, seed, scratch, progress, tokens)


def _train(model, data, optimizer, arguments, seed, scratch, progress, tokens_per_step):
    steps = arguments["max_steps"]
    watch = _Watch(progress, tokens_per_step)
    trainer = _InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(scratch),
            logging_steps=max(1, steps // 50),
            logging_nan_inf_filter=False,
            max_grad_norm=1.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            **arguments,
        ),
        train_dataset=data,
        optimizers=(optimizer, None),
        callbacks=[watch],
    )
    # The Trainer prints its log as dictionaries; progress and rows say it better.
    trainer.remove_callback(next(type(c) for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
    trainer.train()
    return watch.losses


class _InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        data: Any = self.train_dataset
        return SequentialSampler(data)


class _Watch(TrainerCallback):
    def __init__(self, progress, tokens_per_step):
        self.progress, self.tokens_per_step, self.losses = progress, tokens_per_step, []

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(self.tokens_per_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise RunFailed(
                    f"the training loss became {logs['loss']} by step {state.global_step}; "
                    "lower --learning-rate or raise --warmup-steps"
                )
            self.losses.append((state.global_step, logs["loss"]))
