"""The training loop, by transformers' Trainer, on any number of ranks: optimizer, checkpoints, signals, checks for NaN."""

import copy
import json
import math
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.functional import pad
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ssmax.errors import RunFailed, Stopped, UserError
from ssmax.hf import private
from ssmax.nn import parameter_groups
from ssmax.runs import signals
from ssmax.training import checkpoints, nonfinite
from ssmax.training.ranks import any_of, world_size


@dataclass(frozen=True)
class Spec:
    """Settings of a training, with AdamW and gradients clipped to norm 1.

    Attributes:
        steps: number of steps.
        batch_size: items in each step, over all devices.
        step_tokens: tokens in each step, for the progress bar.
        device_batch_size: items in each forward pass on a device; gradients accumulate.
        learning_rate: learning rate after a linear warm-up.
        betas: AdamW's betas.
        weight_decay: weight decay of parameters of rank >= 2 that are not scales.
        warmup_steps: steps in which the learning rate rises.
        schedule: schedule after the warm-up, by transformers' name.
        precision: dtype of the matrix products, "float32" or "bfloat16".
        checkpoint_steps: steps between two checkpoints; 0 for none but those that a signal or
            branch asks for.
        seed: the Trainer's seed.
        owner: owner of the checkpoints, see checkpoints.owner.
        branch: a step of this training from which another training continues, or None.
    """

    steps: int
    batch_size: int
    step_tokens: int
    device_batch_size: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    schedule: str
    precision: str
    checkpoint_steps: int
    seed: int
    owner: str
    branch: "Branch | None" = None


@dataclass(frozen=True)
class Branch:
    """A checkpoint that is written for another training, which continues from it.

    Attributes:
        step: the step after which it is written.
        folder: the other training's folder of checkpoints.
        owner: the other training's owner.
    """

    step: int
    folder: Path
    owner: str


@dataclass(frozen=True)
class Setup:
    """How a training runs. This does not change what it computes.

    Attributes:
        shard: shard weights and optimizer over the ranks (FSDP2); otherwise each rank holds all of
            them (DDP).
        report_to: a tracker of transformers' Trainer, such as "tensorboard" or "wandb".
    """

    shard: bool = False
    report_to: str = "none"


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        model: the trained model with all its weights, on the CPU or on this rank's device. If it
            was sharded, ranks other than the main one have its initial weights.
        losses: (step, mean loss since the last entry), in nats per token.
    """

    model: PreTrainedModel
    losses: list[tuple[float, float]]


def train(
    model: PreTrainedModel,
    data: Any,
    spec: Spec,
    folder: Path,
    progress: Callable[[int], Any],
    setup: Setup = Setup(),
    before_step: Callable[[nn.Module, int], Any] = lambda model, step: None,
) -> Trained:
    """Train a model. The training continues from the newest complete checkpoint in folder, if there is one.

    Args:
        model: the model, trained in place. If it is sharded, a copy of it receives the trained
            weights on the main rank.
        data: a data set of spec.steps times spec.batch_size items, read in order.
        spec: what is computed.
        folder: folder of the checkpoints.
        progress: called after each step with its number of tokens.
        setup: how it runs.
        before_step: called before each step with the model and the number of finished steps.

    Raises:
        UserError: the ranks cannot share the batch.
        RunFailed: a number is not finite.
        Stopped: a signal came; a checkpoint is written first.
    """
    sharded = setup.shard and world_size() > 1
    more: dict[str, Any] = {"fsdp": True, "fsdp_config": FSDP} if sharded else {}
    watch = _Watch(spec, progress, before_step)
    whole = copy.deepcopy(model) if sharded else model
    trainer = _InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            **batch_arguments(spec.batch_size, spec.device_batch_size),
            max_steps=spec.steps,
            learning_rate=spec.learning_rate,  # this and the next three are for trackers: create_optimizer reads spec
            adam_beta1=spec.betas[0],
            adam_beta2=spec.betas[1],
            weight_decay=spec.weight_decay,
            lr_scheduler_type=spec.schedule,
            warmup_steps=spec.warmup_steps,
            bf16=spec.precision == "bfloat16",
            logging_steps=max(1, spec.steps // 50),
            logging_nan_inf_filter=False,
            max_grad_norm=1.0,
            save_strategy="steps" if spec.checkpoint_steps else "no",
            save_steps=spec.checkpoint_steps or 1,
            save_total_limit=2,
            report_to=setup.report_to,
            disable_tqdm=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            use_cpu=not torch.cuda.is_available(),
            seed=spec.seed,
            **more,
        ),
        train_dataset=data,
        callbacks=[watch],
    )
    trainer.spec, watch.trainer = spec, trainer
    # Remove the callback that prints the Trainer's log as dictionaries; the progress bar and the rows hold the same.
    trainer.remove_callback(next(type(c) for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
    newest = checkpoints.newest(folder, spec.owner)
    watch.resumed = newest
    with signals.deferred():
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    signals.check()
    if watch.stopped:  # by a signal that reached another rank
        raise Stopped(signal.SIGTERM)
    nonfinite.check_weights(trainer.model, trainer.state.global_step)
    if sharded:
        trained: Any = trainer.model
        state = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_world_process_zero():
            whole.load_state_dict(state)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return Trained(whole, losses)


FSDP = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}


def batch_arguments(batch_size: int, device_batch_size: int) -> dict[str, Any]:
    """Return the Trainer's arguments with which a step sees batch_size items on any number of ranks.

    Raises:
        UserError: the ranks cannot share the batch evenly.
    """
    ranks = world_size()
    share, rest = divmod(batch_size, ranks)
    if rest:
        raise UserError(f"a batch of {batch_size} cannot be shared by {ranks} ranks; give a multiple as --batch-size")
    rounds = next(k for k in range(-(-share // device_batch_size), share + 1) if share % k == 0)
    return {"per_device_train_batch_size": share // rounds, "gradient_accumulation_steps": rounds}


def _by_position(model: Any) -> list[nn.Module]:
    """Return the output projection and the feed-forward of the last layer. Nothing if it is not built like Llama's."""
    last = (getattr(model.base_model, "layers", None) or [None])[-1]
    projection, feed_forward = getattr(getattr(last, "self_attn", None), "o_proj", None), getattr(last, "mlp", None)
    dense = isinstance(feed_forward, nn.Module) and isinstance(getattr(feed_forward, "down_proj", None), nn.Linear)
    return [projection, feed_forward] if isinstance(projection, nn.Linear) and dense else []


@contextmanager
def _last_layer_from(model, first):
    """Let the last layer leave out what it computes for each position by itself, at positions before first."""
    hooks = []
    for module in _by_position(model):
        hooks.append(module.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, first:],)))
        hooks.append(module.register_forward_hook(lambda _, inputs, output: pad(output, (0, 0, first, 0))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _InOrder(Trainer):
    """The Trainer with the data in order, the paper's parameter groups, and a check that each step's numbers are finite."""

    spec: Spec
    model: Any  # without its wrappers

    def _get_train_sampler(self, train_dataset=None):
        data: Any = self.train_dataset
        return SequentialSampler(data)

    def create_accelerator_and_postprocess(self):
        """accelerate shards on accelerators only. For CPUs, where FSDP2 works too, it is told that they are GPUs."""
        state = private.accelerator_state()
        kind = state.get("distributed_type")
        if self.args.fsdp and kind == DistributedType.MULTI_CPU:
            state["distributed_type"] = DistributedType.MULTI_GPU
        try:
            super().create_accelerator_and_postprocess()
        finally:
            state["distributed_type"] = kind

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            groups = parameter_groups(trained, self.spec.learning_rate, self.spec.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, betas=self.spec.betas, fused=True)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Keep the batch, to find the module of a number that is not finite."""
        self.batch = inputs
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Compute only what the loss reads: logits from the first token with a label on, the answer in an example of a task."""
        labels = inputs["labels"]
        first = int(labels.ne(-100).any(0).int().argmax())
        if first <= 1:
            return super().compute_loss(model, inputs, *args, **kwargs)
        kept = labels[:, first - 1 :]
        inputs = {**inputs, "labels": kept, "logits_to_keep": kept.shape[1]}
        with _last_layer_from(self.model, first - 1):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _clip_grad_norm(self, model):
        """Stop before a step that is not finite. A NaN in the loss or in any gradient makes the gradients' norm NaN."""
        norm: Any = super()._clip_grad_norm(model)
        if not math.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm):
            with self.compute_loss_context_manager():
                where = nonfinite.first_not_finite(self.model, self._prepare_inputs(self.batch))
            raise RunFailed(f"step {self.state.global_step + 1}: {where}; {ADVICE}")
        return norm

    def _save_checkpoint(self, model, trial):
        """Save like the Trainer, with the losses since the last log entry, which the Trainer does not save."""
        nonfinite.check_weights(self.model, self.state.global_step)
        super()._save_checkpoint(model, trial)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        (folder / f"loss-{self.args.process_index}.json").write_text(json.dumps(private.unlogged_loss(self)))


ADVICE = "lower --learning-rate or raise --warmup-steps with another --out. Finished stages and the last good checkpoint are kept"


class _Watch(TrainerCallback):
    """Progress, the caller's before_step, stopping after a signal, and the seal of a complete checkpoint."""

    trainer: Any
    resumed: Path | None = None
    stopped = False

    def __init__(self, spec, progress, before_step):
        self.spec, self.progress, self.before_step = spec, progress, before_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress(state.global_step * self.spec.step_tokens)
        if self.resumed is not None:  # the mean over ranks, whose number may have been different
            kept = [json.loads(path.read_text()) for path in self.resumed.glob("loss-*.json")]
            private.unlogged_loss(self.trainer, (sum(loss for loss, _ in kept) / len(kept), kept[0][1]))

    def on_step_begin(self, args, state, control, **kwargs):
        self.before_step(kwargs["model"], state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(self.spec.step_tokens)
        if self.spec.branch and state.global_step == self.spec.branch.step:
            control.should_save = True
        if any_of(signals.asked_to_stop()):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        checkpoint, branch = Path(args.output_dir) / f"checkpoint-{state.global_step}", self.spec.branch
        if branch and state.global_step == branch.step:
            checkpoints.copy(checkpoint, branch.folder, branch.owner)
        checkpoints.seal(checkpoint, self.spec.owner)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and not math.isfinite(logs["loss"]):
            raise RunFailed(f"the training loss became {logs['loss']} by step {state.global_step}; {ADVICE}")
