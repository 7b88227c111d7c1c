"""What is trained and measured: a recipe is a function that returns a Recipe; the command line is made from its fields."""

from dataclasses import dataclass

__all__ = ["RECIPES", "STAGES", "Job", "Recipe", "smoke", "tiny"]

# What is done with each model, in this order.
STAGES = ("pretrain", "position_loss", "finetune", "retrieval")


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


@dataclass(frozen=True)
class Recipe:
    """One run of the paper's experiments.

    Attributes:
        name: the recipe's name.
        variants: letters of the paper's models: a Softmax, b SSMax.
        forms: "paper" (a Llama-shaped model as in Table 1), "qk-norm" (the same with QK-norm, transformers' Qwen3).
        seeds: one model is trained for each seed, form and variant; the variants of a seed share weights and data.
        hidden_size, num_layers, num_heads, intermediate_size, vocab_size: shape of the model; head size is hidden / heads.
        train_length: tokens of a training window.
        batch_size: windows a step.
        steps: of pretraining.
        learning_rate, warmup_steps: linear warm-up, then constant.
        weight_decay: on parameters of rank >= 2 only.
        finetune_steps, finetune_batch_size, finetune_learning_rate, finetune_warmup_steps: the retrieval fine-tuning,
            cosine, no decay.
        needle_digits: length of the needle's number; the paper's is 7.
        loss_texts: held-out texts for the loss by position.
        length_factor: how far past the training length everything is measured.
        theta_factors: of RoPE at test time.
        depths: of the needle, 0 = start of the text.
        trials: examples for each retrieval cell of length x depth.
        score_trials: trials of the top needle score.
        score_length_factor: context of the needle scores, in training lengths.
        corpus_bytes: how much text is read.
    """

    name: str
    variants: tuple[str, ...] = ("a", "b")
    forms: tuple[str, ...] = ("paper", "qk-norm")
    seeds: tuple[int, ...] = (0, 1, 2)
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 176
    vocab_size: int = 512
    train_length: int = 128
    batch_size: int = 32
    steps: int = 260
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    finetune_steps: int = 440
    finetune_batch_size: int = 32
    finetune_learning_rate: float = 3e-3
    finetune_warmup_steps: int = 20
    needle_digits: int = 2
    loss_texts: int = 24
    length_factor: int = 16
    theta_factors: tuple[int, ...] = (1, 50)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 16
    score_trials: int = 100
    score_length_factor: int = 8
    corpus_bytes: int = 64_000_000

    @property
    def jobs(self) -> list[Job]:
        """The recipe's models, the variants of a seed side by side."""
        return [Job(form, variant, seed) for seed in self.seeds for form in self.forms for variant in self.variants]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Context sizes of the retrieval test: the training length, doubled up to length_factor times it."""
        return tuple(self.train_length * 2**k for k in range(self.length_factor.bit_length()))


def smoke() -> Recipe:
    """Everything once, too small to show anything: for the tests, under a minute."""
    return Recipe(
        name="smoke",
        forms=("paper",),
        seeds=(0,),
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=88,
        vocab_size=300,
        train_length=64,
        batch_size=8,
        steps=30,
        warmup_steps=5,
        finetune_steps=10,
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
    """Softmax against SSMax on two CPU cores in a quarter of an hour."""
    return Recipe(name="tiny")


RECIPES = {"smoke": smoke, "tiny": tiny}
