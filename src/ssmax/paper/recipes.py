"""Recipes: settings of the paper's experiments. The command line is made from the fields of Recipe."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from ssmax.errors import UserError
from ssmax.paper.models import FORMS, VARIANTS
from ssmax.paper.stages import STAGES
from ssmax.runs.settings import check_fields, setting


def turns(theta: float, length: int) -> float:
    """Return the share of RoPE's frequencies that complete a turn within length tokens.

    Frequency i of a head with d components has the wavelength 2 pi theta^(2i/d). So the share, of
    the range of 2i/d, is log(length / 2 pi) / log theta for any d.
    """
    return math.log(length / (2 * math.pi)) / math.log(theta)


def fitting_theta(length: int, share: float) -> float:
    """Return RoPE's theta at which that share of the frequencies completes a turn within length tokens."""
    return (length / (2 * math.pi)) ** (1 / share)


PAPER_THETA = 10_000.0
PAPER_TURNS = turns(PAPER_THETA, 1024)  # 0.553: 18 of the 32 frequencies of a head of 64


# Fields that earlier versions did not have, with the values that they used, so that their runs can be continued.
LATER = {"theta": PAPER_THETA, "full_turns": PAPER_TURNS, "needle_theta_factors": (), "needle_rope": "theta"}


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


# A field's group of options on the command line.
_models, _shape, _text = (partial(setting, group) for group in ("models", "architecture", "text"))
_train, _tune, _measure = (partial(setting, group) for group in ("pretraining", "fine_tuning", "measurement"))


@dataclass(frozen=True)
class Recipe:
    """One run of the paper's experiments. Every field but the name is an option of the command line.

    Raises:
        UserError: a field is out of its range, or two fields contradict each other.
    """

    once: ClassVar[tuple[str, ...]] = ("formula",)  # stages that belong to no model
    later: ClassVar[dict[str, Any]] = LATER

    name: str
    models: tuple[str, ...] = _models(
        ("paper:abcdefp",),
        "Models to train, as FORM:LETTERS. Forms: "
        + " ".join(f"{name}: {form.title}, {form.family}." for name, form in FORMS.items())
        + " Letters: "
        + " ".join(f"{letter}: {variant.help}." for letter, variant in VARIANTS.items()),
    )
    retrieval: tuple[str, ...] = _models(
        ("paper:ab",), "Of these models, those that are fine-tuned and tested on needles.", empty=True
    )
    counting: tuple[str, ...] = _models(
        (), "Of these models, those that learn to count words, which needs flat attention.", empty=True
    )
    seeds: tuple[int, ...] = _models(
        (0, 1, 2), "Each seed trains every model once. All models of a seed share weights and data.", zero=True
    )
    hidden_size: int = _shape(128, "Width of the model: number of heads times head size.")
    num_layers: int = _shape(2, "Number of layers.")
    num_heads: int = _shape(4, "Attention heads in each layer.")
    intermediate_size: int = _shape(352, "Width of the feed-forward layer.")
    vocab_size: int = _text(512, "Number of tokens of the tokenizer that is trained on the corpus.")
    tokenizer: str = _text("", "A tokenizer's folder or its name on a hub. Empty: one is trained on the corpus.")
    train_length: int = _text(128, "Length of a training window, in tokens.")
    theta: float = _shape(0.0, "RoPE's theta in training. 0: computed from --full-turns.", zero=True)
    full_turns: float = _shape(
        PAPER_TURNS,
        "Share of RoPE's frequencies that complete a turn within the training length; sets theta (the paper: 0.553).",
    )
    batch_size: int = _train(32, "Windows in each step, over all devices.")
    device_batch_size: int = _train(32, "Windows in a forward pass on one device; gradients accumulate.")
    precision: Literal["float32", "bfloat16"] = _train("float32", "Dtype of the matrix products. Weights stay float32.")
    steps: int = _train(400, "Steps of pretraining.")
    learning_rate: float = _train(3e-3, "Learning rate of pretraining, constant after the warm-up.")
    warmup_steps: int = _train(50, "Warm-up steps of pretraining.", zero=True)
    weight_decay: float = _train(0.1, "Weight decay of matrices. Norms, s and b are not decayed.", zero=True)
    checkpoint_steps: int = _train(
        0, "Steps between two checkpoints. 0: only when it is stopped, and of (a) where (f) branches off.", zero=True
    )
    finetune_steps: int = _tune(1500, "Steps of fine-tuning on needles.")
    count_steps: int = _tune(440, "Steps of fine-tuning on counting.")
    finetune_batch_size: int = _tune(32, "Examples in each step of fine-tuning.")
    finetune_learning_rate: float = _tune(1e-3, "Learning rate of fine-tuning: warm-up, then a cosine to zero.")
    finetune_warmup_steps: int = _tune(50, "Warm-up steps of fine-tuning.", zero=True)
    needle_digits: int = _tune(2, "Digits of the number that a needle hides (the paper: 7).")
    loss_texts: int = _measure(24, "Held-out texts for the loss by position.")
    length_factor: int = _measure(32, "Longest context that is measured, in training lengths.")
    theta_factors: tuple[int, ...] = _measure((50,), "Factors of RoPE's theta for the loss by position.")
    needle_theta_factors: tuple[int, ...] = _measure(
        (),
        "Factors by which RoPE is stretched for needles, see --needle-rope. None: the largest of --theta-factors.",
        empty=True,
    )
    needle_rope: Literal["theta", "llama3"] = _measure(
        "theta",
        "RoPE when needles are measured. theta: theta is multiplied by --needle-theta-factors. llama3: Llama 3.1's rule "
        "divides the slow frequencies by them, and keeps those that complete 4 turns in training.",
    )
    depths: tuple[float, ...] = _measure(
        (0.0, 0.25, 0.5, 0.75, 1.0), "Depths of the needle in the text, 0 (start) to 1 (end).", zero=True, most=1
    )
    trials: int = _measure(16, "Needles for each size and depth. Counting takes 8 times as many texts for each size.")
    score_trials: int = _measure(60, "Trials of the needle scores.")
    score_length_factor: int = _measure(32, "Context of the needle scores, in training lengths.")
    corpus_bytes: int = _text(64_000_000, "Bytes of text to read, without --tokenizer.")
    corpus_tokens: int = _text(0, "Tokens to prepare, with --tokenizer. 0: as many as training reads.", zero=True)

    def __post_init__(self):
        check_fields(self)
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"--hidden-size must be a multiple of twice --num-heads, for RoPE; got {self.hidden_size}, {self.num_heads}"
            )
        if self.train_length < 2:
            raise UserError(f"--train-length must be at least 2, a token and the next one; got {self.train_length}")
        trained = _letters("--models", self.models)
        for form, letters in trained.items():
            for variant in map(VARIANTS.__getitem__, letters):
                if variant.made_of not in letters:  # "" is in every text
                    raise UserError(
                        f"--models {form}:{letters}: {variant.letter} is made of {variant.made_of}, which is missing"
                    )
        for option in ("retrieval", "counting"):
            for form, letters in _letters(f"--{option}", getattr(self, option)).items():
                if any(x not in trained.get(form, "") or not VARIANTS[x].measured for x in letters):
                    raise UserError(
                        f"--{option} {form}:{letters} asks for models that --models does not train, or for p"
                    )

    @property
    def jobs(self) -> list[Job]:
        """The recipe's models, ordered by seed, form and variant."""
        forms = self.letters("models").items()
        return [Job(form, letter, seed) for seed in self.seeds for form, letters in forms for letter in letters]

    def letters(self, option: str) -> dict[str, str]:
        """Return form -> letters of the variants that an option (models, retrieval or counting) names."""
        return _letters(f"--{option}", getattr(self, option))

    def stages(self, job: Job) -> list[str]:
        """Return the stages of a model, in their order."""
        return [stage.name for stage in STAGES.values() if stage.asked(self, job)]

    @property
    def rope_theta(self) -> float:
        """RoPE's theta in training."""
        return self.theta or fitting_theta(self.train_length, self.full_turns)

    @property
    def needle_factors(self) -> tuple[int, ...]:
        """Factors of RoPE's theta under which needles are measured."""
        return self.needle_theta_factors or (max(self.theta_factors),)

    @property
    def prepared_tokens(self) -> int:
        """Number of training tokens to prepare, with a given tokenizer."""
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
        if form not in FORMS or form in found or not letters or set(letters) - set(VARIANTS):
            raise UserError(
                f"{option} must be FORM:LETTERS, a form of {', '.join(FORMS)} (each once) and letters of {''.join(VARIANTS)}; got {model!r}"
            )
        found[form] = "".join(sorted(set(letters)))
    return found


def smoke() -> Recipe:
    """All stages once, for the tests. It takes less than a minute and is too small to show an effect."""
    return Recipe(
        name="smoke",
        theta=PAPER_THETA,
        counting=("paper:ab",),
        seeds=(0,),
        hidden_size=32,
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
    """The paper's own form, all variants, figures 1 to 8, four seeds, on two CPU cores in less than 20 minutes."""
    return Recipe(
        name="tiny",
        seeds=(0, 1, 2, 3),
        hidden_size=96,
        intermediate_size=256,
        needle_rope="llama3",
        needle_theta_factors=(32,),
        trials=12,
        score_trials=40,
    )


def laptop() -> Recipe:
    """Three forms, six variants, five seeds, retrieval by all variants, and counting, on two CPU cores in about two hours."""
    return Recipe(
        name="laptop",
        models=("paper:abcdefp", "qk-norm:abcdef", "partial-rope:abcdef"),
        retrieval=("paper:abcdef",),
        counting=("qk-norm:ab",),
        count_steps=1200,
        seeds=(0, 1, 2, 3, 4),
        score_trials=100,
        checkpoint_steps=200,
        theta_factors=(1, 50),
        needle_rope="llama3",
        needle_theta_factors=(32,),
    )


def laws() -> Recipe:
    """Laws of n at equal steps, in the paper's form at laptop's size: loss by position, on two CPU cores in half an hour."""
    return Recipe(name="laws", models=("paper:abcdgtqly",), retrieval=())


def small() -> Recipe:
    """All forms and variants on one GPU; target: about an hour; not yet run."""
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
        needle_digits=4,
        theta_factors=(1, 50),
        score_trials=100,
        score_length_factor=8,
        trials=32,
    )


def paper() -> Recipe:
    """The paper's Tables 1 to 3: 162,129,408 parameters and 144 scales. The number of pretraining steps is our choice."""
    return Recipe(
        name="paper",
        theta=PAPER_THETA,
        retrieval=("paper:abcdef",),
        seeds=(0,),
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=2048,
        vocab_size=50_257,
        tokenizer="gpt2",
        train_length=1024,
        batch_size=2048,
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


RECIPES = {"smoke": smoke, "tiny": tiny, "laptop": laptop, "laws": laws, "small": small, "paper": paper}
