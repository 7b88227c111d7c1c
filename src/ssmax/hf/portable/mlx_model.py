"""Scalable-Softmax (arXiv 2501.19399) for mlx-lm: queries are multiplied by s log n + b; n is how many keys a query sees.

The model is mlx-lm's own, except for its attention. mlx-lm runs this file if it is given --trust-remote-code.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama as family
from mlx_lm.models.base import scaled_dot_product_attention


class Scale(nn.Module):
    """Multiplies each query by s log n + b. s (weight) and b (bias) are numbers per head, in float32."""

    def __init__(self, heads, bias):
        super().__init__()
        self.weight = mx.zeros(heads)
        if bias:
            self.bias = mx.zeros(heads)

    def __call__(self, queries, n):
        """Return the scaled queries (B, H, N, D), rounded once to their dtype."""
        if self.weight.size != queries.shape[1]:
            raise ValueError(f"SSMax has {self.weight.size} heads, the query {queries.shape[1]}: it was sharded")
        m = self.weight[:, None, None] * mx.log(mx.maximum(n, 1).astype(mx.float32))
        return (queries * (m + self.bias[:, None, None] if "bias" in self else m)).astype(queries.dtype)


def visible_keys(queries, keys, mask):
    """n, the number of keys that each query sees, from the mask: (), (N, 1) or (B, 1, N, 1)."""
    rows, size = queries.shape[-2], (keys[0] if isinstance(keys, tuple) else keys).shape[-2]  # a tuple: quantised
    if mask is None:
        return mx.array(size)
    if isinstance(mask, str):
        return mx.arange(size - rows + 1, size + 1)[:, None]
    if mask.dtype != mx.bool_:
        raise ValueError("SSMax cannot count the keys of a mask of numbers")
    return mask.sum(-1, keepdims=True)


class Attention(family.Attention):
    """mlx-lm's attention, with scaled queries."""

    def __call__(self, x, mask=None, cache=None):
        """Return what mlx-lm's returns."""
        heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part(x).reshape(*x.shape[:2], n, -1) for part, n in zip(projections, heads, strict=True))
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        offset = 0 if cache is None else cache.offset
        q, k = (self.rope(part.transpose(0, 2, 1, 3), offset=offset) for part in (q, k))
        v = v.transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        q = self.ssmax(q, visible_keys(q, k, mask))
        output = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))


class ModelArgs(family.ModelArgs):
    """mlx-lm's, from a config of transformers 5."""

    @classmethod
    def from_dict(cls, config):
        """Return the arguments of Model."""
        rope = config["rope_parameters"]
        own = {"rope_theta": rope["rope_theta"], "rope_scaling": rope, "layer_types": None}
        args = super().from_dict({**config, **own})
        args.ssmax = config["ssmax"]
        return args


class Model(family.Model):
    """mlx-lm's model; the layers in config.ssmax have a scale."""

    def __init__(self, args):
        super().__init__(args)
        for index in args.ssmax["layers"]:
            attention = self.layers[index].self_attn
            attention.__class__ = Attention
            attention.ssmax = Scale(attention.n_heads, args.ssmax["bias"])
        if args.model_type == "ssmax_mistral" and args.sliding_window:  # in all layers
            self.model.swa_idx = 0
            for layer in self.layers:
                layer.use_sliding = True

    def cast_predicate(self, name):
        """Whether mlx_lm.convert may change the dtype of a parameter."""
        return ".ssmax." not in name
