"""The stages of an evaluation: each reads the model's tokens of the same texts and returns its rows."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssmax.errors import UserError
from ssmax.evaluation import ABCDigits, NeedleTask, PromptForm
from ssmax.evaluation.measures import attention_rows, draw_trials, loss_rows, retrieval_rows
from ssmax.evaluation.retrieval import grid_tokens
from ssmax.lab import training
from ssmax.lab.recipes import Recipe, paper
from ssmax.results import Row
from ssmax.suite.settings import Settings

__all__ = ["Material", "finetune", "run_stage", "stage_tokens"]

# How much text a trial may begin in, in lengths of the longest context.
HAYSTACK_LENGTHS = 8


@dataclass(frozen=True)
class Material:
    """The texts in one model's tokens.

    Attributes:
        settings: what is measured, length and sizes filled in.
        texts: documents, in the order in which they are taken.
        tokenizer: the model's.
    """

    settings: Settings
    texts: list[str]
    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        """Return token ids, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @cached_property
    def documents(self) -> list[Tensor]:
        """The first texts that are long enough, cut to the length."""
        length, found, longest = self.settings.length, [], 0
        for text in self.texts:
            if len(text) < length:  # a token has at least a character, in text that is worth reading
                continue
            ids = self.tokenizer(text, verbose=False)["input_ids"]
            longest = max(longest, len(ids))
            if len(ids) >= length:
                found.append(torch.tensor(ids[:length]))
            if len(found) == self.settings.documents:
                return found
        if found:
            return found
        longest = longest or max(len(self.encode(text)) for text in self.texts)
        raise UserError(
            f"the text is too short: no document has {length:,} tokens, the longest has {longest:,}; give longer --texts, or "
            "a smaller --length"
        )

    @cached_property
    def haystack(self) -> np.ndarray:
        """Text around the needles."""
        wanted, found = HAYSTACK_LENGTHS * max(self.settings.sizes), []
        for text in self.texts:
            found += self.encode(text)
            if len(found) >= wanted:
                break
        return np.array(found[:wanted], dtype=np.int64)

    def task(self, name: str) -> NeedleTask | ABCDigits:
        """Return the task of a name, in the model's tokens."""
        form = PromptForm.of(self.tokenizer, self.settings.prompt)
        if name == "abc":
            return ABCDigits(self.encode, form=form)
        extra = self.settings.distractors if name == "distractors" else 0
        return NeedleTask(self.encode, self.haystack, distractors=extra, several=name == "several", form=form)

    def trials(self, name: str) -> list[dict]:
        """Return the trials of a task."""
        s = self.settings
        return draw_trials(self.task(name), s.sizes, s.depths, s.trials, s.seed)


def stage_tokens(stage: str, material: Material) -> int:
    """Return the work of a stage for the progress bar, in tokens."""
    if stage == "finetune":
        s = material.settings
        return s.finetune_steps * s.finetune_batch_size * s.finetune_length
    if stage in ("loss", "attention"):
        return sum(map(len, material.documents))
    return grid_tokens(material.trials(stage))


def run_stage(
    stage: str,
    variant: str,
    model: PreTrainedModel,
    material: Material,
    chunk: int,
    progress: Callable[[int], Any],
) -> list[Row]:
    """Measure a model and return the rows."""
    s = material.settings
    place: dict[str, Any] = {"theta_factor": s.theta_factor}
    if s.rope:
        place["rope"] = s.rope
    options: dict[str, Any] = {"variant": variant, "chunk": chunk, "progress": progress}
    if stage in ("loss", "attention"):
        rows_of = loss_rows if stage == "loss" else attention_rows
        return rows_of(model, material.documents, at=place, **options)
    place |= {"task": stage, "prompt": s.prompt, "finetune_steps": s.finetune_steps}
    return retrieval_rows(model, material.trials(stage), at=place, **options)


def finetune(
    variant: str, model: PreTrainedModel, material: Material, folder: Path, progress: Callable[[int], Any]
) -> list[Row]:
    """Fine-tune a model on the first task as in the paper's Table 3 and save it as folder; return its training loss."""
    s, task = material.settings, material.task(material.settings.tasks[0])
    recipe = _recipe(s)

    def draw(length, rng):
        depth = rng.random()
        return task.grid([(length, depth)], rng)[length, depth]

    shortest = task.shortest if isinstance(task, NeedleTask) else 64
    examples = training.Examples(draw, shortest, recipe, recipe.finetune_steps, s.seed)
    scratch = folder.with_name(f"{folder.name}-checkpoints")
    trained = training.finetune(model, recipe, examples, scratch, progress)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    trained.model.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    return [
        Row("train_loss", variant, s.seed, {"stage": "finetune", "step": step}, loss, 1)
        for step, loss in trained.losses
    ]


def _recipe(s: Settings) -> Recipe:
    return dataclasses.replace(
        paper(),
        train_length=s.finetune_length,
        finetune_steps=s.finetune_steps,
        finetune_batch_size=s.finetune_batch_size,
        device_batch_size=min(s.finetune_batch_size, 8),
        finetune_learning_rate=s.finetune_learning_rate,
        finetune_warmup_steps=max(1, s.finetune_steps // 10),
        precision="float32",
        checkpoint_steps=0,
    )
