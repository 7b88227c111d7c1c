"""How a model runs during a measurement: eval mode, and its backbone without the vocabulary."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ssmax.hf.visibility import forward_scope

__all__ = ["eval_mode", "run_backbone"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def run_backbone(model: PreTrainedModel, token_ids: Tensor, cache: Cache) -> Any:
    """Append (B, T) tokens to the cache; return the backbone's output, whose last_hidden_state the vocabulary's head reads."""
    with forward_scope():
        return model.base_model(input_ids=token_ids, past_key_values=cache, use_cache=True)
