"""Checks that a model can be measured: from its config before it is loaded, and in its first forward pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ssmax.compare.stages import Material, Needs
from ssmax.errors import UserError
from ssmax.evaluation.attention import attend
from ssmax.evaluation.reading import Reader, eval_mode
from ssmax.evaluation.rope import rope_scaling, rope_theta
from ssmax.hf.shapes import check_shape, largest_token, shape_of

SAMPLE = 48  # tokens of the first forward


def check_fit(config: PreTrainedConfig, tokenizer: Any, needs: Mapping[str, Needs]) -> None:
    """Compare the tokenizer and the stages' needs with the shapes of the model that config describes.

    Raises:
        UserError: a context is longer than the model's table of positions, or a token lies beyond
            its vocabulary.
    """
    largest = largest_token(tokenizer, *(need.largest for need in needs.values()))
    for stage, need in needs.items():
        check_shape(config, largest, stage, need.longest, need.options)


def check_rope(config: PreTrainedConfig, theta_factor: float, parameters: Mapping[str, Any] | None) -> None:
    """Raise ValueError if the RoPE of the model that config describes cannot be changed in this way."""
    model = shape_of(config)
    if model is not None and (theta_factor != 1 or parameters is not None):
        with rope_theta(model, theta_factor), rope_scaling(model, parameters):
            pass


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
