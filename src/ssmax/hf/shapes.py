"""What the shapes of a model allow, from its config alone: the tokens of its vocabulary and the positions of its tables."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ssmax.errors import UserError

# Rows that a table of learned positions may have beyond the config's number (BART, OPT: 2).
BEYOND = 3


def largest_token(tokenizer: Any, *used: int) -> int:
    """Return the largest id of a tokenizer and of the tokens that are used.

    Special tokens that were added to a tokenizer (padding) do no harm until one is used.
    """
    return max(*used, *(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))


def check_shape(config: PreTrainedConfig, largest: int, what: str, length: int, option: str) -> None:
    """Check what is asked for against the model that config describes.

    Args:
        config: a model's config.
        largest: largest token id.
        what: what asks for it, such as the name of a stage.
        length: tokens of the longest context.
        option: the option that sets the length.

    Raises:
        UserError: the context is longer than the model's table of positions, or the token lies
            beyond its vocabulary.
    """
    model = shape_of(config)
    if model is None:  # the first forward finds problems later
        return
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if vocabulary is not None and largest >= vocabulary:
        raise UserError(
            f"the tokenizer has token {largest}, but the model's vocabulary ends at {vocabulary - 1} ({vocabulary} tokens): they "
            "do not belong together; save the model's own tokenizer into its folder"
        )
    positions = _positions(model, config)
    if positions is not None and length > positions:
        raise UserError(
            f"{what} asks for {length:,} tokens, but the model has only {positions:,} positions; give {option} of at most {positions}"
        )


def shape_of(config: PreTrainedConfig) -> PreTrainedModel | None:
    """Return the causal language model that a config describes, on the meta device; None if it cannot be built without weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:
        return None


def _positions(model: PreTrainedModel, config: PreTrainedConfig) -> int | None:
    """Return the number of positions in the model's tables; None if it has no table (RoPE, ALiBi, no positions)."""
    known = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if known is None:
        return None
    tables: list[Any] = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    words: list[Any] = [
        x.weight for x in (model.get_input_embeddings(), model.get_output_embeddings()) if x is not None
    ]
    tables = [table for table in tables if not any(table is word for word in words)]
    # Tables that are computed once, of sines or of rotations (CTRL, GPT-J), end as well.
    for name, module in model.named_modules():
        if not hasattr(module, "make_weights"):  # XGLM's table grows
            buffers = module.named_buffers(recurse=False)
            tables += [buffer for own, buffer in buffers if buffer.ndim == 2 and "pos" in f"{name}.{own}"]
    tables += [
        x for x in (getattr(module, "pos_encoding", None) for module in model.modules()) if isinstance(x, torch.Tensor)
    ]
    return known if any(0 <= len(table) - known < BEYOND for table in tables) else None
