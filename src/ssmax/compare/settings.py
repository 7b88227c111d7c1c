"""Settings of ssmax evaluate. Its options on the command line are made from these fields. No torch."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from ssmax.compare.tasks import TASKS
from ssmax.errors import UserError
from ssmax.runs.settings import check_fields, setting

MEASURES = ("loss", "attention", "retrieval")
TaskName: TypeAlias = Literal[tuple(TASKS)]  # pyrefly: ignore (known when the file is read)


@dataclass(frozen=True)
class Contender:
    """A model to measure.

    Attributes:
        name: its name in rows, figures and file names.
        source: its folder, or its name on a hub.
    """

    name: str
    source: str


# A field's group of options on the command line.
_measure, _retrieval = partial(setting, "measurement"), partial(setting, "retrieval")
_rope, _tune = partial(setting, "rope"), partial(setting, "fine_tuning")


@dataclass(frozen=True)
class Settings:
    """One evaluation. Every field but name, models and lengths is an option of the command line.

    Raises:
        UserError: a field is out of its range, or two fields contradict each other.
    """

    once: ClassVar[tuple[str, ...]] = ()  # stages of a run's folder that belong to no model
    later: ClassVar[dict[str, Any]] = {}

    name: str
    models: tuple[str, ...]
    measures: tuple[Literal["loss", "attention", "retrieval"], ...] = _measure(
        MEASURES,
        "loss: loss by position. attention: sharpness of attention. retrieval: numbers found in long texts, and needle scores.",
    )
    length: int = _measure(
        0, "Tokens of each text, for loss and attention. 0: the shortest context in the models' configs.", zero=True
    )
    documents: int = _measure(4, "Texts for loss and attention. Their spread gives the confidence band.")
    tasks: tuple[TaskName, ...] = _retrieval(
        ("needle",), " ".join(f"{name}: {task.help}." for name, task in TASKS.items())
    )
    sizes: tuple[int, ...] = _retrieval(
        (), "Context sizes, in tokens. None: five equal steps up to --length.", empty=True
    )
    depths: tuple[float, ...] = _retrieval(
        (0.0, 0.25, 0.5, 0.75, 1.0), "Depths of the needle in the text, 0 (start) to 1 (end).", zero=True, most=1
    )
    trials: int = _retrieval(4, "Texts for each size and depth.")
    distractors: int = _retrieval(3, "Further needles in the task distractors.")
    prompt: Literal["base", "chat"] = _retrieval(
        "base", "base: the model continues the sentence. chat: the tokenizer's chat template asks for the number."
    )
    theta_factor: float = _rope(1.0, "Factor of RoPE's theta (the paper: 50).")
    rope: str = _rope(
        "", """RoPE scaling of transformers, as JSON: '{"rope_type": "yarn", "factor": 4}'. None: the model's own."""
    )
    finetune_steps: int = _tune(
        0, "Steps of fine-tuning on the first task, before retrieval. 0: no fine-tuning.", zero=True
    )
    finetune_length: int = _tune(1024, "Longest context of fine-tuning, in tokens.")
    finetune_batch_size: int = _tune(128, "Examples in each step of fine-tuning.")
    finetune_learning_rate: float = _tune(2e-5, "Learning rate of fine-tuning, along a cosine.")
    dtype: Literal["auto", "float32", "bfloat16"] = _measure("auto", "Dtype of the weights. auto: as they are saved.")
    seed: int = _measure(0, "Seed that chooses texts, numbers and cities.", zero=True)

    def __post_init__(self):
        check_fields(self)
        _ = self.rope_parameters
        places = [_resolved(model) for model in self.models]
        if again := [model for i, model in enumerate(self.models) if places[i] in places[:i]]:
            raise UserError(f"{again[0]} is given twice; give each model once")

    @property
    def rope_parameters(self) -> dict[str, Any] | None:
        """The RoPE scaling, parsed."""
        if not self.rope:
            return None
        try:
            found = json.loads(self.rope)
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"""--rope must be JSON like '{{"rope_type": "yarn", "factor": 4}}', got {self.rope!r}""")
        return found

    @property
    def jobs(self) -> list[Contender]:
        """The models with short names: the names of their folders if these differ, otherwise their whole paths."""
        names = [_resolved(model).name for model in self.models]
        if len(set(names)) < len(names):
            names = [model.strip("/").replace("/", "-") for model in self.models]
        if len(set(names)) < len(names):  # a/b-c and a-b/c
            names = [f"{place}-{name}" for place, name in enumerate(names, 1)]
        return [Contender(name, model) for name, model in zip(names, self.models, strict=True)]

    def stages(self, job: Contender) -> list[str]:
        """Return the stages of a model, in their order."""
        named: list[str] = [measure for measure in ("loss", "attention") if measure in self.measures]
        if "retrieval" in self.measures:
            named += ["finetune"] * bool(self.finetune_steps) + list(self.tasks)
        return named


def _resolved(model):
    """Return the folder of a model without links and dots, or its name on a hub as a path."""
    return Path(model).resolve() if Path(model).exists() else Path(model)
