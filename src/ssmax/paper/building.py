"""Builds the models that ssmax.paper.models lists: a new model of a form, with the scales of its variant."""

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssmax.conversion import convert
from ssmax.hf.layers import language_layers
from ssmax.nn import SSMaxScale
from ssmax.paper.models import FORMS, VARIANTS
from ssmax.paper.recipes import Recipe
from ssmax.scaling import scale_query
from ssmax.visible import rows_of


class SwitchedScale(SSMaxScale):
    """The scale of (f). Until it is turned on it computes Softmax; s is in the optimizer, but its gradient is zero."""

    def __init__(self, num_heads: int, s: float):
        super().__init__(num_heads, s)
        self.register_buffer("on", torch.tensor(False), persistent=False)

    def forward(self, query: Tensor, n: Tensor | int, log_n: Tensor | None = None) -> Tensor:
        """Return the scaled query; before the switch, the query itself."""
        return torch.where(self.on, super().forward(query, n, log_n), query)


class LearnedFactors(nn.Module):
    """The scale of Figure 2: s p_n + b. There is one p for each n, shared by all layers and heads. It starts as Softmax.

    Args:
        num_heads: query heads, H. Each starts with s = 1 and b = 0.
        p: (N,), for n = 1 to N; a parameter of the model.
    """

    def __init__(self, num_heads: int, p: nn.Parameter):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num_heads)), nn.Parameter(torch.zeros(num_heads))
        self.shared = (p,)  # in a tuple, so that it is not a parameter of each layer and checkpoints hold it once

    def forward(self, query: Tensor, n: Tensor | int, log_n: Tensor | None = None) -> Tensor:
        """Return the scaled query in query's dtype."""
        p_BHN = self.shared[0][rows_of(n, query) - 1]
        return scale_query(query, self.weight[:, None] * p_BHN + self.bias[:, None])


def build_model(recipe: Recipe, form: str, variant: str, seed: int, vocab_size: int, end: int = 0) -> PreTrainedModel:
    """Return a new model of the recipe's size. All variants of a seed have the same weights; end is the end-of-text id."""
    family, rope = FORMS[form].family, {"rope_type": "default", "rope_theta": recipe.rope_theta, **FORMS[form].rope}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        head_dim=recipe.hidden_size // recipe.num_heads,
        max_position_embeddings=recipe.train_length,
        rope_parameters=rope,
        attention_bias=False,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    chosen = VARIANTS[variant]
    options = chosen.conversion(recipe)
    if options is not None:
        convert(model, "matched", **options)
    chosen.finish(model, recipe)
    return model


def put_switches(model: PreTrainedModel) -> None:
    """Let a converted model compute Softmax until set_switches."""
    for layer in language_layers(model).values():
        layer.module.ssmax = SwitchedScale(layer.heads, model.config.ssmax["s"])


def put_learned_factors(model: PreTrainedModel, train_length: int) -> None:
    """Give a softmax model one learned factor for each n, model.learned_p."""
    model.learned_p = p = nn.Parameter(torch.ones(train_length))
    for layer in language_layers(model).values():
        layer.module.ssmax = LearnedFactors(layer.heads, p)


def switch_at(recipe: Recipe) -> int:
    """Return the pretraining step at which (f) turns to SSMax: seven eighths."""
    return recipe.steps * 7 // 8


def set_switches(model: nn.Module, on: bool) -> None:
    """Let (f) compute SSMax from now on, or Softmax. Other models do not change."""
    for module in model.modules():
        if isinstance(module, SwitchedScale):
            module.on.fill_(on)
