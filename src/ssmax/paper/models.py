"""The paper's models, one entry each: forms (the shape of a model) and variants (what its attention computes). No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Form:
    """A shape of the models.

    Attributes:
        name: its name in rows and on the command line.
        title: its name in reports.
        family: a family of transformers, with the classes FAMILYConfig and FAMILYForCausalLM.
        rope: parameters of its RoPE other than type and theta.
    """

    name: str
    title: str
    family: str
    rope: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A model to compare. All variants of a seed start from the same weights.

    Attributes:
        letter: its name in rows and on the command line.
        title: its name in reports.
        help: its text on the command line.
        colour: its colour in figures.
        options: options of convert, with init "matched"; None for Softmax. A function of the recipe
            if they depend on it.
        finish: called with the converted model and its recipe, to replace the scales.
        made_of: the variant whose trained model is converted, without further training, to make
            this one.
        branch_of: the variant whose training it shares until it switches. If both are trained, that
            part is trained once.
        measured: False for a model that is not saved, since only the values learned in its training
            are of interest.
    """

    letter: str
    title: str
    help: str
    colour: str
    options: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] | None = None
    finish: Callable[[Any, Any], None] = lambda model, recipe: None
    made_of: str = ""
    branch_of: str = ""
    measured: bool = True

    def conversion(self, recipe: Any) -> Mapping[str, Any] | None:
        """Return the options of convert in a recipe."""
        return self.options(recipe) if callable(self.options) else self.options


def _switch_late(model, recipe):
    from ssmax.paper.building import put_switches  # loads torch

    put_switches(model)


def _learn_factors(model, recipe):
    from ssmax.paper.building import put_learned_factors

    put_learned_factors(model, recipe.train_length)


def _llama4(recipe):
    return {"law": "llama-4", "law_parameters": {"floor": recipe.train_length}}


def _yarn(recipe):
    return {"law": "yarn", "law_parameters": {"factor": recipe.length_factor}}


FORMS = {
    form.name: form
    for form in (
        Form("paper", "paper's form", "Llama"),
        Form("qk-norm", "with QK-norm", "Qwen3"),
        Form("partial-rope", "with partial RoPE", "Glm", {"partial_rotary_factor": 0.5}),
    )
}
VARIANTS = {
    variant.letter: variant
    for variant in (
        Variant("a", "Softmax", "Softmax", "#d55e00"),
        Variant("b", "SSMax", "SSMax", "#0072b2", {}),
        # Nothing is learned, so its law is log n itself.
        Variant("c", "SSMax without s", "SSMax without s", "#56b4e9", {"law": "ssmax-fixed"}),
        Variant("d", "SSMax with b", "SSMax with bias", "#009e73", {"bias": True}),
        Variant("e", "switched afterwards", "Softmax, converted after its training", "#e69f00", {}, made_of="a"),
        Variant(
            "f",
            "switched late",
            "Softmax that switches to SSMax for the last eighth",
            "#cc79a7",
            {},
            _switch_late,
            branch_of="a",
        ),
        # Other laws of n, for the recipe laws. The exponent starts midway between a temperature (0) and log n (1).
        Variant(
            "g",
            "s (log n)^gamma",
            "s (log n)^gamma",
            "#882255",
            {"law": "ssmax-power", "law_parameters": {"gamma": 0.5}},
        ),
        Variant("t", "temperature without n", "a learned temperature without n", "#000000", {"law": "temperature"}),
        Variant("q", "query-aware", "TabICLv2's law", "#117733", {"law": "query-aware"}),
        Variant(
            "l",
            "Llama 4's law afterwards",
            "Softmax with Llama 4's law after its training",
            "#999933",
            _llama4,
            made_of="a",
        ),
        Variant(
            "y",
            "YaRN's constant afterwards",
            "Softmax with YaRN's constant after its training",
            "#888888",
            _yarn,
            made_of="a",
        ),
        Variant("p", "", "one factor learned for each n (Figure 2)", "", finish=_learn_factors, measured=False),
    )
}
