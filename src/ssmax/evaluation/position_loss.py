"""Loss at each position of long texts, in memory that does not grow with length x vocabulary (the paper's Fig. 5)."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from ssmax.evaluation.mode import eval_mode

__all__ = ["loss_by_position"]


@torch.inference_mode()
def loss_by_position(model: PreTrainedModel, token_ids: Tensor, *, chunk: int = 1024) -> Tensor:
    """Return the loss of each token given all before it.

    Entry t is -log p(token t+1 | tokens 0..t), in nats. The text passes in chunks of positions through a key-value
    cache, so that logits exist for one chunk at a time.

    Args:
        model: a causal language model of transformers; evaluated in eval mode.
        token_ids: (B, T) integers, no padding.
        chunk: positions per forward pass; smaller needs less memory.

    Returns:
        (B, T - 1), float32.

    Raises:
        ValueError: token_ids are not (B, T) integers with T >= 2, or chunk is below 1.
    """
    if token_ids.ndim != 2 or token_ids.is_floating_point() or token_ids.shape[1] < 2:
        raise ValueError(f"token_ids must be integers (B, T), T >= 2; got {token_ids.dtype} {tuple(token_ids.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    with eval_mode(model):
        return _loss(model, token_ids.to(model.device), chunk)


def _loss(model, token_ids, chunk):
    inputs, targets = token_ids[:, :-1], token_ids[:, 1:]
    cache = DynamicCache(config=model.config)
    losses = []
    for rows, wanted in zip(inputs.split(chunk, 1), targets.split(chunk, 1), strict=True):
        logits = model(input_ids=rows, past_key_values=cache, use_cache=True).logits
        losses.append(cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none"))
    return torch.cat(losses, 1)
