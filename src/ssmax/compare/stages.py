"""The stages of an evaluation: each measures a model on the same texts, in the model's tokens, and returns rows."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssmax.compare.settings import Settings
from ssmax.compare.tasks import TASKS
from ssmax.errors import UserError
from ssmax.evaluation import PromptForm
from ssmax.evaluation.retrieval import grid_tokens
from ssmax.evaluation.rows import attention_rows, document_losses, draw_trials, loss_rows, retrieval_rows
from ssmax.paper import training
from ssmax.paper.recipes import Recipe, paper
from ssmax.runs.rows import Row

# Length of the text around the needles, in lengths of the longest context.
HAYSTACK_LENGTHS = 8


@dataclass(frozen=True)
class Material:
    """The texts in one model's tokens.

    Attributes:
        settings: what is measured, as filled_in returns it.
        texts: documents, in the order in which they are used.
        tokenizer: the model's tokenizer.
    """

    settings: Settings
    texts: list[str]
    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        """Return token ids, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @cached_property
    def documents(self) -> list[Tensor]:
        """The first texts that have at least settings.length tokens, cut to that length, (length,) each."""
        length, found, longest = self.settings.length, [], 0
        for text in self.texts:
            if len(text) < length:  # too short: a token has at least one character in ordinary text
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
        """Tokens of the text around the needles, (T,)."""
        wanted, found = HAYSTACK_LENGTHS * max(self.settings.sizes), []
        for text in self.texts:
            found += self.encode(text)
            if len(found) >= wanted:
                break
        return np.array(found[:wanted], dtype=np.int64)

    def sample(self, count: int) -> list[int]:
        """Return the first tokens of the texts."""
        return next(ids for text in self.texts if len(ids := self.encode(text)) > 1)[:count]

    def task(self, name: str) -> Any:
        """Return a task by its name, in the model's tokens."""
        return TASKS[name].make(self, PromptForm.of(self.tokenizer, self.settings.prompt))

    def trials(self, name: str) -> list[dict]:
        """Return the trials of a task."""
        s = self.settings
        return draw_trials(self.task(name), s.sizes, s.depths, s.trials, s.seed)


@dataclass(frozen=True)
class Needs:
    """What a stage needs of a model, known from the tokens alone.

    Attributes:
        tokens: number of tokens that it reads, for the progress bar.
        longest: tokens of its longest context.
        options: the option that sets this length.
        largest: largest token id.
    """

    tokens: int
    longest: int
    options: str
    largest: int


def stage_needs(stage: str, material: Material) -> Needs:
    """Return what a stage needs of a model. Raise UserError or ValueError if the texts do not suffice."""
    s = material.settings
    if stage in ("loss", "attention"):
        documents = material.documents
        return Needs(sum(map(len, documents)), s.length, "--length", max(int(ids.max()) for ids in documents))
    trials = material.trials(s.tasks[0] if stage == "finetune" else stage)
    largest = max(max(example.prompt + example.answer) for trial in trials for example in trial.values())
    if stage == "finetune":
        work = s.finetune_steps * s.finetune_batch_size * s.finetune_length
        return Needs(work, s.finetune_length, "--finetune-length", largest)
    return Needs(grid_tokens(trials), max(s.sizes), "--sizes", largest)


def run_stage(
    stage: str,
    variant: str,
    model: PreTrainedModel,
    material: Material,
    chunk: int,
    progress: Callable[[int], Any],
) -> list[Row]:
    """Run one stage that measures a model, and return its rows."""
    s = material.settings
    place: dict[str, Any] = {"theta_factor": s.theta_factor}
    if s.rope:
        place["rope"] = s.rope
    options: dict[str, Any] = {"chunk": chunk, "progress": progress}
    if stage == "loss":
        return loss_rows(document_losses(model, material.documents, **options), variant=variant, at=place)
    if stage == "attention":
        return attention_rows(model, material.documents, variant=variant, at=place, **options)
    place |= {"task": stage, "prompt": s.prompt, "finetune_steps": s.finetune_steps}
    return retrieval_rows(model, material.trials(stage), variant=variant, at=place, **options)


def finetune(
    variant: str, model: PreTrainedModel, material: Material, folder: Path, progress: Callable[[int], Any]
) -> list[Row]:
    """Fine-tune a model on the first task as in the paper's Table 3, save it, and return rows of its training loss."""
    s, task = material.settings, material.task(material.settings.tasks[0])
    recipe = finetune_recipe(s)
    draw, shortest = partial(training.at_any_depth, task), getattr(task, "shortest", 64)
    examples = training.task_examples(draw, shortest, recipe, recipe.finetune_steps, s.seed)
    scratch = folder.with_name(f"{folder.name}-checkpoints")
    trained = training.finetune(model, recipe, examples, scratch, progress)
    training.save_stage(trained.model, folder, recipe)
    shutil.rmtree(scratch, ignore_errors=True)
    return [
        Row("train_loss", variant, s.seed, {"stage": "finetune", "step": step}, loss, 1)
        for step, loss in trained.losses
    ]


def finetune_recipe(s: Settings) -> Recipe:
    """Return the recipe of a fine-tuning: the paper's, with what the settings say."""
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
