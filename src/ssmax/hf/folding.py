"""fold: multiply s into the query projection, for inference without a learned factor."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ssmax.hf.checkpoint import SSMaxModel
from ssmax.hf.layers import language_layers
from ssmax.modules.whole import scale_parameters, whole_or_not_at_all
from ssmax.nn import SSMaxScale
from ssmax.private import has_hooks

QUERY_NORMS = ("q_norm", "query_norm", "q_layernorm", "query_layernorm", "qk_norm", "qk_layernorm")


def _scaled_layers(model):
    try:
        layers = {i: layer for i, layer in language_layers(model).items() if hasattr(layer.module, "ssmax")}
    except ValueError:  # an encoder, or an encoder-decoder
        layers = {}
    if len(layers) != len(model.config.ssmax["layers"]):
        raise ValueError(
            f"{type(model).__name__} has scales outside of a decoder-only language model's layers; fold takes no others"
        )
    return layers


def _written(model):
    layers = _scaled_layers(model).values() if isinstance(model, SSMaxModel) else ()
    queries = [layer.module.q_proj for layer in layers if isinstance(getattr(layer.module, "q_proj", None), nn.Linear)]
    return scale_parameters(model) + [parameter for query in queries for parameter in query.parameters()]


@torch.no_grad()
@whole_or_not_at_all(_written)
def fold(model: PreTrainedModel) -> PreTrainedModel:
    """Multiply each head's rows of q_proj by its s, in place, and set s to 1: the same model, scaled by log n alone.

    softmax((s log n) q k) = softmax(log n (s q) k), since RoPE is linear. The outputs change by
    rounding only (about 3e-5 of the logits in float32). s is frozen.

    Args:
        model: a converted model of transformers without b.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not a converted decoder-only model; it has a bias b, which is not
            multiplied by log n; a projection is not one nn.Linear of heads x head size in floating
            point; a weight is offloaded or shared; or something that is not linear (QK-norm,
            clipping) lies between projection and scale. The model stays as it was.

    Example:
        >>> ssmax.fold(ssmax.convert(model))
    """
    if not isinstance(model, SSMaxModel):
        raise ValueError(f"{type(model).__name__} is not a converted model of transformers; there is no s to fold")
    layers = _scaled_layers(model)
    for index, layer in layers.items():
        obstacle = _obstacle(layer)
        if obstacle:
            raise ValueError(f"s of layer {index} cannot be folded into the query projection: {obstacle}")
    if len({layer.module.q_proj.weight for layer in layers.values()}) < len(layers):
        raise ValueError("layers share one query projection; it cannot take the s of each")
    for layer in layers.values():
        s = layer.module.ssmax.s
        for parameter in (layer.module.q_proj.weight, layer.module.q_proj.bias):
            if parameter is not None:
                rows = parameter.unflatten(0, (layer.heads, -1))
                factor = s.to(parameter.device).reshape(-1, *(1,) * (rows.ndim - 1))
                parameter.copy_((rows * factor).flatten(0, 1))
        s.fill_(1.0).requires_grad_(False)
    model.config.ssmax = {**model.config.ssmax, "folded": True, "s": 1.0}
    return model


def _obstacle(layer):
    module = layer.module
    if not isinstance(module.ssmax, SSMaxScale):
        return f"it has law {module.ssmax.law}, and fold takes s log n alone"
    if module.ssmax.b is not None:
        return "it has a bias b"
    if type(getattr(module, "q_proj", None)) is not nn.Linear:
        return "it has no q_proj that is an nn.Linear"
    if module.q_proj.weight.is_meta:
        return "q_proj's weight is offloaded, or on the meta device"
    if type(module.q_proj.weight.data) is not torch.Tensor or not module.q_proj.weight.is_floating_point():
        return f"q_proj's weight is quantised or sharded ({type(module.q_proj.weight.data).__name__})"
    if has_hooks(module.q_proj):
        return "q_proj has hooks"
    if module.q_proj.out_features != layer.heads * getattr(module, "head_dim", 0):
        return f"q_proj has {module.q_proj.out_features} rows, which is not heads x head size"
    norms = [name for name in QUERY_NORMS if getattr(module, name, None) is not None]
    if norms:
        return f"{norms[0]} lies between projection and scale"
    if getattr(module.config, "clip_qkv", None) is not None:
        return "queries are clipped (clip_qkv)"
    return None
