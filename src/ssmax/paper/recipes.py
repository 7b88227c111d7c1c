"""What is trained and measured: a recipe is a function that returns a Recipe; the command line is made from its fields."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from ssmax.errors import UserError

__all__ = [
    "FORMS",
    "LATER",
    "PAPER_THETA",
    "PAPER_TURNS",
    "RECIPES",
    "TOGETHER",
    "Job",
    "Recipe",
    "laptop",
    "paper",
    "small",
    "smoke",
    "tiny",
    "turns",
]

FORMS = ("paper", "qk-norm", "partial-rope")
LETTERS = "abcdefp"
# Stages that all ranks of a distributed run do together; the others are one rank's work.
TOGETHER = ("pretrain", "finetune", "count")


def turns(theta: float, length: int) -> float:
    """Return the share of RoPE's frequencies that complete a turn within length tokens.

    Frequency i of a head of d components has the wavelength 2 pi theta^(2i/d), so that the share (of the range of
    2i/d) is log(length / 2 pi) / log theta, whatever d is.
    """
    return math.log(length / (2 * math.pi)) / math.log(theta)


PAPER_THETA = 10_000.0
PAPER_TURNS = turns(PAPER_THETA, 1024)  # 0.553: 18 of the 32 frequencies of a head of 64


# Fields that 0.1.0 did not have, with what it did: its runs continue.
LATER = {"theta": PAPER_THETA, "full_turns": PAPER_TURNS, "needle_theta_factors": ()}


@dataclass(frozen=True)
class Job:
    """One model: a form and a variant, from one seed."""

    form: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.form}-{self.variant}-{self.seed}"


def _field(default: Any, text: str, *, zero: bool = False, empty: bool = False) -> Any:
    return field(default=default, metadata={"help": text, "zero": zero, "empty": empty})


@dataclass(frozen=True)
class Recipe:
    """One run of the paper's experiments. Every field but the name is an option of the command line.

    Raises:
        UserError: a field that makes no sense, or two that do not fit.
    """

    once: ClassVar[tuple[str, ...]] = ("formula",)  # stages that belong to no model
    later: ClassVar[dict[str, Any]] = LATER

    name: str
    models: tuple[str, ...] = _field(
        ("paper:abcdefp",),
        "The models, as FORM:LETTERS. Forms: paper (Llama's shape), qk-norm (the same with normalised queries and keys), "
        "partial-rope (RoPE on half of each head). Letters: the paper's a to f, and p for its Figure 2.",
    )
    retrieval: tuple[str, ...] = _field(
        ("paper:ab",), "Which of them are fine-tuned and asked for needles.", empty=True
    )
    counting: tuple[str, ...] = _field(
        (), "Which of them learn to count, a task that wants flat attention.", empty=True
    )
    seeds: tuple[int, ...] = _field(
        (0, 1, 2), "One model each; the models of a seed share initial weights and data.", zero=True
    )
    hidden_size: int = _field(128, "Width of the model; the head size is this by the number of heads.")
    num_layers: int = _field(2, "Layers of the model.")
    num_heads: int = _field(4, "Attention heads of a layer.")
    intermediate_size: int = _field(352, "Width of the feed-forward layer.")
    vocab_size: int = _field(512, "Of the byte-pair tokenizer that is trained on the corpus.")
    tokenizer: str = _field("", "A tokenizer's folder, or its name on a hub. Default: train one on the corpus.")
    train_length: int = _field(128, "Tokens of a training window.")
    theta: float = _field(
        0.0, "RoPE's theta in training. 0: the one for which full_turns of the frequencies complete a turn.", zero=True
    )
    full_turns: float = _field(
        PAPER_TURNS,
        "Share of RoPE's frequencies that complete a turn within the training length, where theta is 0; the paper's is 0.553.",
    )
    batch_size: int = _field(32, "Windows of a step, over all devices.")
    device_batch_size: int = _field(32, "Windows that pass at once on a device; the rest of a step accumulates.")
    precision: Literal["float32", "bfloat16"] = _field("float32", "Of the matrix products in training.")
    steps: int = _field(400, "Of pretraining.")
    learning_rate: float = _field(3e-3, "Of pretraining: linear warm-up, then constant.")
    warmup_steps: int = _field(50, "Of pretraining.", zero=True)
    weight_decay: float = _field(0.1, "On parameters of rank >= 2 alone.", zero=True)
    checkpoint_steps: int = _field(0, "Steps between checkpoints inside a training; 0 for none.", zero=True)
    finetune_steps: int = _field(1500, "Of the fine-tuning on needles.")
    count_steps: int = _field(440, "Of the fine-tuning on counting.")
    finetune_batch_size: int = _field(24, "Examples of a step of fine-tuning.")
    finetune_learning_rate: float = _field(1e-3, "Of fine-tuning: linear warm-up, then a cosine to zero.")
    finetune_warmup_steps: int = _field(50, "Of fine-tuning.", zero=True)
    needle_digits: int = _field(2, "Digits of the needle's number; the paper's is 7.")
    loss_texts: int = _field(24, "Held-out texts for the loss by position.")
    length_factor: int = _field(32, "How far past the training length everything is measured.")
    theta_factors: tuple[int, ...] = _field((50,), "Multiply RoPE's theta by these for the loss by position.")
    needle_theta_factors: tuple[int, ...] = _field(
        (),
        "Multiply RoPE's theta by these for needles; figures show the largest. Default: the largest of theta_factors.",
        empty=True,
    )
    depths: tuple[float, ...] = _field((0.0, 0.25, 0.5, 0.75, 1.0), "Of the needle; 0 = start of the text.", zero=True)
    trials: int = _field(16, "Needles for each context size and depth, and texts to count in for each size.")
    score_trials: int = _field(60, "Trials of the needle scores.")
    score_length_factor: int = _field(32, "Context of the needle scores, in training lengths.")
    corpus_bytes: int = _field(64_000_000, "How much text is read, where it is held in memory.")
    corpus_tokens: int = _field(
        0, "Training tokens to prepare, with a tokenizer; 0: what pretraining reads.", zero=True
    )

    def __post_init__(self):
        for f in fields(self):
            value, option = getattr(self, f.name), f"--{f.name.replace('_', '-')}"
            values = value if isinstance(value, tuple) else (value,)
            numbers = [x for x in values if isinstance(x, (int, float))]
            zero = f.metadata.get("zero", False)
            if any(x < 0 or (x == 0 and not zero) or x != x for x in numbers):
                raise UserError(f"{option} must be {'at least 0' if zero else 'positive'}, got {value}")
            if value == () and not f.metadata["empty"]:
                raise UserError(f"{option} must be positive numbers or names, got none")
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"--hidden-size must be a multiple of twice --num-heads, for RoPE; got {self.hidden_size}, {self.num_heads}"
            )
        trained = _letters("--models", self.models)
        for form, letters in trained.items():
            if "e" in letters and "a" not in letters:
                raise UserError(f"--models {form}:{letters}: e is made of a, which is missing")
        for option in ("retrieval", "counting"):
            for form, letters in _letters(f"--{option}", getattr(self, option)).items():
                unknown = set(letters) - (set(trained.get(form, "")) - {"p"})
                if unknown:
                    raise UserError(
                        f"--{option} {form}:{letters} asks for models that --models does not train, or for p"
                    )

    @property
    def jobs(self) -> list[Job]:
        """The recipe's models, the variants of a seed side by side."""
        forms = _letters("--models", self.models)
        return [Job(form, letter, seed) for seed in self.seeds for form, letters in forms.items() for letter in letters]

    def stages(self, job: Job) -> list[str]:
        """What is done with a model, in this order."""
        named = [] if job.variant == "e" else ["pretrain"]
        named += [] if job.variant == "p" else ["position_loss"]
        for option, stages in (("retrieval", ["finetune", "retrieval"]), ("counting", ["count", "counting"])):
            named += stages if job.variant in _letters(option, getattr(self, option)).get(job.form, "") else []
        return named

    @property
    def rope_theta(self) -> float:
        """RoPE's theta in training."""
        return self.theta or (self.train_length / (2 * math.pi)) ** (1 / self.full_turns)

    @property
    def needle_factors(self) -> tuple[int, ...]:
        """Factors of RoPE's theta under which needles are asked for."""
        return self.needle_theta_factors or (max(self.theta_factors),)

    @property
    def prepared_tokens(self) -> int:
        """Training tokens that are prepared, with a given tokenizer."""
        return self.corpus_tokens or self.steps * self.batch_size * self.train_length

    @property
    def lengths(self) -> tuple[int, ...]:
        """Context sizes of the retrieval test: the training length, doubled up to length_factor times it."""
        return tuple(self.train_length * 2**k for k in range(self.length_factor.bit_length()))


def _letters(option, models):
    """Form -> letters, from FORM:LETTERS."""
    found = {}
    for model in models:
        form, _, letters = model.partition(":")
        if form not in FORMS or form in found or not letters or set(letters) - set(LETTERS):
            raise UserError(
                f"{option} must be FORM:LETTERS, a form of {', '.join(FORMS)} (each once) and letters of {LETTERS}; got {model!r}"
            )
        found[form] = "".join(sorted(set(letters)))
    return found


def smoke() -> Recipe:
    """Everything once, too small to show anything: for the tests, under a minute."""
    return Recipe(
        name="smoke",
        theta=PAPER_THETA,
        models=("paper:abcdefp",),
        retrieval=("paper:ab",),
        counting=("paper:ab",),
        seeds=(0,),
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=88,
        vocab_size=300,
        train_length=64,
        batch_size=8,
        steps=30,
        learning_rate=4e-3,
        warmup_steps=5,
        theta_factors=(1, 50),
        finetune_steps=10,
        finetune_learning_rate=3e-3,
        count_steps=10,
        finetune_batch_size=8,
        finetune_warmup_steps=2,
        loss_texts=4,
        length_factor=4,
        depths=(0.0, 0.5, 1.0),
        trials=2,
        score_trials=4,
        score_length_factor=2,
        corpus_bytes=1_000_000,
    )


def tiny() -> Recipe:
    """The paper's own form, all variants, figures 1 to 8, on two CPU cores in a quarter of an hour."""
    return Recipe(name="tiny", needle_theta_factors=(200,))


def laptop() -> Recipe:
    """Three forms, six variants, five seeds, retrieval of all and counting, on two CPU cores; up to two hours are meant."""
    return Recipe(
        name="laptop",
        models=("paper:abcdefp", "qk-norm:abcdef", "partial-rope:abcdef"),
        retrieval=("paper:abcdef", "qk-norm:ab"),
        counting=("qk-norm:ab",),
        count_steps=1200,
        seeds=(0, 1, 2, 3, 4),
        score_trials=100,
        checkpoint_steps=200,
        theta_factors=(1, 50),
        needle_theta_factors=(50, 200),
    )


def small() -> Recipe:
    """All forms and variants on one GPU; about an hour is meant, and has not been measured."""
    return Recipe(
        name="small",
        theta=PAPER_THETA,
        models=tuple(f"{form}:abcdefp" for form in FORMS),
        retrieval=tuple(f"{form}:abcdef" for form in FORMS),
        counting=tuple(f"{form}:ab" for form in FORMS),
        hidden_size=256,
        num_layers=6,
        num_heads=8,
        intermediate_size=688,
        vocab_size=4096,
        train_length=256,
        batch_size=64,
        device_batch_size=64,
        precision="bfloat16",
        steps=1500,
        learning_rate=2e-3,
        warmup_steps=100,
        checkpoint_steps=500,
        finetune_steps=600,
        count_steps=600,
        finetune_batch_size=64,
        finetune_learning_rate=1e-3,
        finetune_warmup_steps=50,
        needle_digits=4,
        theta_factors=(1, 50),
        score_trials=100,
        score_length_factor=8,
        length_factor=32,
        trials=32,
    )


def paper() -> Recipe:
    """The paper's Tables 1 to 3: 162,129,408 parameters and 144 scales. Steps of pretraining are our choice."""
    return Recipe(
        name="paper",
        theta=PAPER_THETA,
        models=("paper:abcdefp",),
        retrieval=("paper:abcdef",),
        counting=(),
        seeds=(0,),
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=2048,
        vocab_size=50_257,
        tokenizer="gpt2",
        train_length=1024,
        batch_size=2048,
        device_batch_size=32,
        precision="bfloat16",
        steps=200_000,
        learning_rate=6e-4,
        warmup_steps=1000,
        checkpoint_steps=1000,
        finetune_steps=10_000,
        finetune_batch_size=128,
        finetune_learning_rate=2e-5,
        finetune_warmup_steps=1000,
        needle_digits=7,
        theta_factors=(1, 50),
        loss_texts=64,
        score_trials=100,
        score_length_factor=8,
        length_factor=20,
        trials=20,
    )


RECIPES = {"smoke": smoke, "tiny": tiny, "laptop": laptop, "small": small, "paper": paper}
