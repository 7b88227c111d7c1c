"""What ssmax evaluate measures; the command line is made from the fields. Loads no torch."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from ssmax.errors import UserError

__all__ = ["MEASURES", "TASKS", "Contender", "Settings"]

MEASURES = ("loss", "attention", "retrieval")
TASKS = ("needle", "several", "distractors", "abc")


@dataclass(frozen=True)
class Contender:
    """A model to measure.

    Attributes:
        name: in rows, figures and file names.
        source: its folder, or its name on a hub.
    """

    name: str
    source: str


def _field(default: Any, text: str, *, zero: bool = False) -> Any:
    return field(default=default, metadata={"help": text, "zero": zero})


@dataclass(frozen=True)
class Settings:
    """One evaluation. Every field but name, models and lengths is an option of the command line.

    Raises:
        UserError: a field that makes no sense, or two that do not fit.
    """

    once: ClassVar[tuple[str, ...]] = ()  # a run folder's stages that belong to no model
    later: ClassVar[dict[str, Any]] = {}

    name: str
    models: tuple[str, ...]
    measures: tuple[Literal["loss", "attention", "retrieval"], ...] = _field(
        MEASURES, "loss by position, sharpness of attention, and retrieval with needle scores."
    )
    length: int = _field(
        0, "Tokens of a text, for loss and attention. Default: the shortest context of the models' configs.", zero=True
    )
    documents: int = _field(4, "Texts for loss and attention; their spread is the confidence band.")
    tasks: tuple[Literal["needle", "several", "distractors", "abc"], ...] = _field(
        ("needle",),
        "needle: the paper's sentence in text. several: one needle of another city at each depth, each asked in its turn. "
        "distractors: needles of other cities that nobody asks for. abc: lines A=482910, one letter asked.",
    )
    sizes: tuple[int, ...] = _field((), "Context sizes of retrieval. Default: length in five equal steps.")
    depths: tuple[float, ...] = _field((0.0, 0.25, 0.5, 0.75, 1.0), "Of the needle; 0 = start of the text.", zero=True)
    trials: int = _field(4, "Texts with a needle for each size and depth.")
    distractors: int = _field(3, "Needles that nobody asks for, in the task of that name.")
    prompt: Literal["base", "chat"] = _field(
        "base", "base: the model goes on with the sentence. chat: it is asked, by its tokenizer's chat template."
    )
    theta_factor: float = _field(1.0, "Multiply RoPE's theta (the paper: 50).")
    rope: str = _field(
        "",
        """Scale RoPE by a rule of transformers, as JSON: '{"rope_type": "yarn", "factor": 4}'. Default: as it is.""",
    )
    finetune_steps: int = _field(
        0, "Fine-tune each model on the first task before retrieval, as the paper does. 0: not at all.", zero=True
    )
    finetune_length: int = _field(1024, "Longest context of fine-tuning.")
    finetune_batch_size: int = _field(128, "Examples of a step of fine-tuning.")
    finetune_learning_rate: float = _field(2e-5, "Of fine-tuning, cosine.")
    dtype: Literal["auto", "float32", "bfloat16"] = _field("auto", "Of the weights. auto: as they are saved.")
    seed: int = _field(0, "Of the choice of texts, numbers and cities.", zero=True)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            option = "MODEL ..." if f.name == "models" else f"--{f.name.replace('_', '-')}"
            numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, (int, float))]
            if any(x < 0 or x != x or (x == 0 and not f.metadata.get("zero")) for x in numbers):
                raise UserError(
                    f"{option} must be {'at least 0' if f.metadata.get('zero') else 'positive'}, got {value}"
                )
            if value == () and f.name != "sizes":
                raise UserError(f"{option} must name at least one, got none")
            if isinstance(value, tuple) and len(set(value)) < len(value):
                raise UserError(f"{option} must name each once, got {' '.join(map(str, value))}")
        if max(self.depths) > 1:
            raise UserError(f"--depths must lie in 0 to 1, got {self.depths}")
        _ = self.rope_parameters

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
        """The models under short names: their folders' names, as far as these differ."""
        paths = [Path(model) for model in self.models]
        short = [path.name or model for path, model in zip(paths, self.models, strict=True)]
        names = (
            short if len(set(short)) == len(short) else [model.strip("/").replace("/", "-") for model in self.models]
        )
        return [Contender(name, model) for name, model in zip(names, self.models, strict=True)]

    def stages(self, job: Contender) -> list[str]:
        """What is done with a model, in this order."""
        named: list[str] = [measure for measure in ("loss", "attention") if measure in self.measures]
        if "retrieval" in self.measures:
            named += ["finetune"] * bool(self.finetune_steps) + list(self.tasks)
        return named
