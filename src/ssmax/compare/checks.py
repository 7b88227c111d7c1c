"""Checks that a model can be measured: from its config before it is loaded, and in its first forward pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ssmax.compare.stages import Material, Needs
from ssmax.errors import UserError
from ssmax.evaluation.attention import attend
from ssmax.evaluation.reading import Reader, eval_mode

SAMPLE = 48  # tokens of the first forward
# Rows that a table of learned positions may have beyond the config's number (BART, OPT: 2).
BEYOND = 3


def check_fit(config: PreTrainedConfig, tokenizer: Any, needs: Mapping[str, Needs]) -> None:
    """Compare the tokenizer and the stages' needs with the shapes of the model that config describes.

    Raises:
        UserError: a context is longer than the model's table of positions, or a token lies beyond
            its vocabulary.
    """
    model = _shape_of(config)
    if model is None:  # the family cannot be built without weights; check_model's forward finds problems later
        return
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    # Special tokens that were added to a tokenizer (padding) do no harm until one is used.
    special = set(tokenizer.all_special_ids)
    largest = max(*(need.largest for need in needs.values()), *(set(tokenizer.get_vocab().values()) - special))
    if vocabulary is not None and largest >= vocabulary:
        raise UserError(
            f"the tokenizer has token {largest}, but the model's vocabulary ends at {vocabulary - 1} ({vocabulary} tokens): they "
            "do not belong together; save the model's own tokenizer into its folder"
        )
    positions = _positions(model, config)
    for stage, need in needs.items():
        if positions is not None and need.longest > positions:
            raise UserError(
                f"{stage} asks for {need.longest:,} tokens, but the model has only {positions:,} positions; "
                f"give {need.options} of at most {positions}"
            )


def _shape_of(config) -> PreTrainedModel | None:
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


@torch.inference_mode()
def check_model(model: PreTrainedModel, material: Material, attention: bool, chunk: int) -> None:
    """Run the first tokens of the texts through the model.

    Args:
        model: the model, on its device.
        material: the tokens of its texts.
        attention: whether its attention weights are needed.
        chunk: positions in each forward pass.

    Raises:
        UserError: the forward fails, uses later tokens or gives NaN, or attention weights are
            needed and not available.
    """
    ids = torch.tensor([material.sample(SAMPLE)], device=model.device)
    try:
        with eval_mode(model), naming_nonfinite(model):
            reader = Reader(model, ids, chunk)
            logits, weights = attend(reader, reader.read(reader.empty(1), ids[:, :-1]), ids[:, -1:], ids.shape[1])
            if logits.isnan().any():
                raise FloatingPointError(f"{type(model).__name__} gives logits that are not numbers (nan)")
        if attention:
            weights.raise_problem()
    except (UserError, MemoryError, OSError):
        raise
    except ValueError as error:
        advice = "; leave it out: --measures loss retrieval" if "attention cannot be measured" in str(error) else ""
        raise UserError(f"{error}{advice}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if "memory" in str(error):
            raise
        raise UserError(
            f"the model fails in its first forward ({type(error).__name__}: {str(error)[:200]}); check its config and its files"
        ) from error


@contextmanager
def naming_nonfinite(model: PreTrainedModel) -> Iterator[None]:
    """Turn a FloatingPointError into a UserError that names the cause: a weight, or the dtype."""
    try:
        yield
    except FloatingPointError as error:
        bad = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
        cause = (
            f"its weight {bad} holds numbers that are not finite; save the model again"
            if bad
            else f"its weights are finite, so they overflow in {model.dtype}; give --dtype float32"
        )
        raise UserError(f"{error}: {cause}") from error
