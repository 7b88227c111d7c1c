"""Data order, optimizer and the training loop: the paper's Tables 2 and 3 by transformers' Trainer, on any number of ranks."""

import copy
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType, PartialState
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ssmax import signals
from ssmax.errors import RunFailed, Stopped, UserError
from ssmax.hf import parameter_groups
from ssmax.lab import checkpoints, finite
from ssmax.lab.models import switch_at, turn_on
from ssmax.lab.ranks import any_of
from ssmax.lab.recipes import Recipe

__all__ = ["Examples", "Setup", "Trained", "Windows", "finetune", "pretrain", "world_size"]


class Windows(Dataset):
    """The training stream cut into windows, in an order that depends on the seed alone: all once, then all again.

    The order of one pass is held, 4 bytes a window (1.5 GiB for the paper's 410 million), and drawn when it is reached.
    It is a plain permutation: windows of a document never meet in a step but by chance, however the text is sorted.

    Args:
        tokens: (T,) with len and slices, such as ssmax.lab.shards.Shards.
        length: tokens of a window.
        count: windows that are asked for.
        seed: of the order.
    """

    def __init__(self, tokens: Any, length: int, count: int, seed: int):
        self.available = len(tokens) // length
        if self.available == 0:
            raise UserError(
                f"the training text has {len(tokens)} tokens, less than one window of {length}; give more text"
            )
        if self.available > np.iinfo(np.uint32).max:
            raise UserError(f"the training text has {self.available:,} windows of {length}, more than 2^32; give less")
        self.tokens, self.length, self.count, self.seed = tokens, length, count, seed
        self.epoch = -1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        epoch, at = divmod(index, self.available)
        self._draw(epoch)
        start = int(self.order[at]) * self.length
        window = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        return {"input_ids": window, "labels": window}

    def _draw(self, epoch):
        """Go to the order of a pass; the generator runs on from pass to pass."""
        if epoch < self.epoch or self.epoch < 0:
            self.rng, self.epoch = np.random.default_rng(self.seed), -1
        while self.epoch < epoch:
            self.order = np.arange(self.available, dtype=np.uint32)
            self.rng.shuffle(self.order)
            self.epoch += 1


class Examples(Dataset):
    """Examples of a task no longer than the training length, longer ones as the training goes on; loss on the answer.

    Args:
        draw: (length, generator) -> an example with prompt and answer of length tokens together.
        shortest: length of the shortest example.
        recipe: its training length and batch size.
        steps: of the training.
        seed: of lengths and examples.
    """

    def __init__(
        self, draw: Callable[[int, np.random.Generator], Any], shortest: int, recipe: Recipe, steps: int, seed: int
    ):
        self.draw, self.recipe, self.steps, self.seed = draw, recipe, steps, seed
        self.shortest = shortest + 8
        if self.shortest > recipe.train_length:
            raise UserError(
                f"an example of the task has at least {self.shortest} tokens and the training window only "
                f"{recipe.train_length}; raise --train-length"
            )

    def __len__(self) -> int:
        return self.steps * self.recipe.finetune_batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step = index // self.recipe.finetune_batch_size
        grown = min(1.0, 0.15 + 2 * step / self.steps)
        longest = self.shortest + int((self.recipe.train_length - self.shortest) * grown)
        # One length for a batch, one example for an index: nothing depends on who asks, or in which order.
        length = int(np.random.default_rng([self.seed, step]).integers(self.shortest, longest + 1))
        example = self.draw(length, np.random.default_rng([self.seed, step, index]))
        tokens = torch.tensor(example.prompt + example.answer)
        labels = tokens.clone()
        labels[: len(example.prompt)] = -100
        return {"input_ids": tokens, "labels": labels}


@dataclass(frozen=True)
class Setup:
    """How a training runs, which does not change what it computes.

    Attributes:
        shard: shard weights and optimizer over the ranks (FSDP2); otherwise each holds all (DDP).
        report_to: a tracker of transformers' Trainer, such as "tensorboard" or "wandb".
    """

    shard: bool = False
    report_to: str = "none"


@dataclass(frozen=True)
class Trained:
    """The trained model, whole, on the CPU or this rank's device, and (step, mean loss since the last entry)."""

    model: PreTrainedModel
    losses: list[tuple[float, float]]


def world_size() -> int:
    """Return the number of ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pretrain(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Any,
    seed: int,
    folder: Path,
    progress: Callable[[int], Any],
    setup: Setup = Setup(),
) -> Trained:
    """Train as in Table 2; checkpoints lie in folder, and the newest whole one there is continued."""
    data = Windows(tokens, recipe.train_length, recipe.steps * recipe.batch_size, seed)
    arguments: dict[str, Any] = {
        "max_steps": recipe.steps,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": recipe.warmup_steps,
    }
    optimizer = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay, "betas": (0.9, 0.95)}
    return _train(model, recipe, data, recipe.batch_size, optimizer, arguments, seed, folder, progress, setup)


def finetune(
    model: PreTrainedModel,
    recipe: Recipe,
    examples: Examples,
    folder: Path,
    progress: Callable[[int], Any],
    setup: Setup = Setup(),
) -> Trained:
    """Fine-tune on a task as in Table 3; checkpoints as in pretrain."""
    arguments: dict[str, Any] = {
        "max_steps": examples.steps,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.finetune_warmup_steps,
    }
    optimizer = {"learning_rate": recipe.finetune_learning_rate, "weight_decay": 0.0, "betas": (0.9, 0.999)}
    size = recipe.finetune_batch_size
    return _train(model, recipe, examples, size, optimizer, arguments, examples.seed, folder, progress, setup)


def _train(model, recipe, data, batch_size, optimizer, arguments, seed, folder, progress, setup):
    steps = arguments["max_steps"]
    sharded = setup.shard and world_size() > 1
    if sharded:
        if hasattr(model, "learned_p"):
            raise UserError("variant p shares one parameter among all layers and cannot be sharded; leave out --shard")
        arguments |= {"fsdp": True, "fsdp_config": FSDP}
    whose = checkpoints.owner(folder, recipe)
    watch = _Watch(recipe, progress, recipe.train_length * batch_size, whose)
    whole = copy.deepcopy(model) if sharded else model
    trainer = _InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            **batch_arguments(batch_size, recipe.device_batch_size),
            bf16=recipe.precision == "bfloat16",
            logging_steps=max(1, steps // 50),
            logging_nan_inf_filter=False,
            max_grad_norm=1.0,
            save_strategy="steps" if recipe.checkpoint_steps else "no",
            save_steps=recipe.checkpoint_steps or 1,
            save_total_limit=2,
            report_to=setup.report_to,
            disable_tqdm=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            **arguments,
        ),
        train_dataset=data,
        callbacks=[watch],
    )
    trainer.wanted, watch.trainer = optimizer, trainer
    # The Trainer prints its log as dictionaries; progress and rows say it better.
    trainer.remove_callback(next(type(c) for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
    newest = checkpoints.newest(folder, whose)
    watch.resumed = newest
    with signals.deferred():
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    signals.check()
    if watch.stopped:  # by a signal that reached another rank
        raise Stopped(signal.SIGTERM)
    finite.check_weights(trainer.weights, trainer.state.global_step)
    if sharded:
        trained: Any = trainer.model
        state = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_world_process_zero():
            whole.load_state_dict(state)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return Trained(whole, losses)


FSDP = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}


def batch_arguments(batch_size: int, device_batch_size: int) -> dict[str, Any]:
    """Return per-device size and accumulation so that a step sees batch_size windows on any number of ranks.

    Raises:
        UserError: the ranks cannot share the batch evenly.
    """
    ranks = world_size()
    share, rest = divmod(batch_size, ranks)
    if rest:
        raise UserError(f"a batch of {batch_size} cannot be shared by {ranks} ranks; give a multiple as --batch-size")
    rounds = next(k for k in range(-(-share // device_batch_size), share + 1) if share % k == 0)
    return {"per_device_train_batch_size": share // rounds, "gradient_accumulation_steps": rounds}


class _InOrder(Trainer):
    """The Trainer with the data in order, the paper's parameter groups, and a look at each step's numbers."""

    wanted: dict[str, Any]

    @property
    def weights(self) -> Any:
        """The model, without what wraps it."""
        return self.model

    def _get_train_sampler(self, train_dataset=None):
        data: Any = self.train_dataset
        return SequentialSampler(data)

    def create_accelerator_and_postprocess(self):
        """Accelerate shards on accelerators alone and ignores the wish on CPUs, where FSDP2 works as well."""
        state = PartialState._shared_state
        kind = state.get("distributed_type")
        if self.args.fsdp and kind == DistributedType.MULTI_CPU:
            state["distributed_type"] = DistributedType.MULTI_GPU
        try:
            super().create_accelerator_and_postprocess()
        finally:
            state["distributed_type"] = kind

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            rate, decay = self.wanted["learning_rate"], self.wanted["weight_decay"]
            trained: Any = self.model if model is None else model
            groups = parameter_groups(trained, rate, decay)
            self.optimizer = torch.optim.AdamW(groups, betas=self.wanted["betas"], fused=True)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Keep the batch for a diagnosis."""
        self.batch = inputs
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Project onto the vocabulary only from the first token that is learned: of a task's example that is the answer."""
        labels = inputs["labels"]
        first = int(labels.ne(-100).any(0).int().argmax())
        if first > 1:
            kept = labels[:, first - 1 :]
            inputs = {**inputs, "labels": kept, "logits_to_keep": kept.shape[1]}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _clip_grad_norm(self, model):
        """Stop before a step that is not finite: a NaN anywhere before, loss included, ends in the gradients' norm."""
        norm: Any = super()._clip_grad_norm(model)
        if not math.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm):
            with self.compute_loss_context_manager():
                where = finite.first_not_finite(self.weights, self._prepare_inputs(self.batch))
            raise RunFailed(f"step {self.state.global_step + 1}: {where}; {ADVICE}")
        return norm

    def _save_checkpoint(self, model, trial):
        """As the Trainer does, with the losses since the last log entry, which it forgets."""
        finite.check_weights(self.weights, self.state.global_step)
        super()._save_checkpoint(model, trial)
        since = [float(self._tr_loss), self._globalstep_last_logged]
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        (folder / f"loss-{self.args.process_index}.json").write_text(json.dumps(since))


ADVICE = "lower --learning-rate or raise --warmup-steps with another --out. Finished stages and the last good checkpoint are kept"


class _Watch(TrainerCallback):
    """Progress, the switch of (f), the wish to stop, and the seal of a whole checkpoint."""

    trainer: Any
    resumed: Path | None = None
    stopped = False

    def __init__(self, recipe, progress, tokens_per_step, whose):
        self.recipe, self.progress, self.tokens_per_step, self.whose = recipe, progress, tokens_per_step, whose

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress(state.global_step * self.tokens_per_step)
        if self.resumed is not None:  # the mean over ranks: they may have been another number
            kept = [json.loads(path.read_text()) for path in self.resumed.glob("loss-*.json")]
            self.trainer._tr_loss += sum(loss for loss, _ in kept) / len(kept)
            self.trainer._globalstep_last_logged = kept[0][1]

    def on_step_begin(self, args, state, control, **kwargs):
        turn_on(kwargs["model"], state.global_step >= switch_at(self.recipe))

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(self.tokens_per_step)
        if any_of(signals.asked_to_stop()):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.whose)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and not math.isfinite(logs["loss"]):
            raise RunFailed(f"the training loss became {logs['loss']} by step {state.global_step}; {ADVICE}")
