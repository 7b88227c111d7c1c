"""Models of the kinds that people write, small, and the same attention computed naively in float64."""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

WIDTH, HEADS = 16, 4


def split(x, heads=HEADS):
    return x.view(*x.shape[:-1], heads, -1).transpose(-2, -3)


def merge(x):
    return x.transpose(-2, -3).flatten(-2)


class CausalSelfAttention(nn.Module):
    """nanoGPT's, with a cache that grows."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = 0.0

    def forward(self, x, cache=None):
        q, k, v = (split(part) for part in self.c_attn(x).split(WIDTH, 2))
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2) if cache else k, torch.cat([cache[1], v], 2) if cache else v
            cache[:] = k, v
        rows, keys = q.shape[2], k.shape[2]
        if rows == keys or rows == 1:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=rows > 1)
        else:  # a chunk behind the cache
            mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(merge(y))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), attention
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x, *context):
        x = x + self.attn(self.norm(x), *context)
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, layers=2, attention=CausalSelfAttention):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(31, WIDTH), nn.Embedding(64, WIDTH)
        self.h = nn.ModuleList(Block(attention()) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 31)

    def forward(self, tokens, caches=None, start=0):
        x = self.wte(tokens) + self.wpe(torch.arange(start, start + tokens.shape[1]))
        for i, block in enumerate(self.h):
            x = block(x) if caches is None else block(x, caches[i])
        return self.head(x)


class Attention(nn.Module):
    """A vision transformer's: fused where it may be; else, or where the switch is off, by hand."""

    def __init__(self, fused=True):
        super().__init__()
        self.qkv, self.proj, self.fused_attn = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), fused

    def forward(self, x):
        q, k, v = (split(part) for part in self.qkv(x).chunk(3, -1))
        if self.fused_attn:
            y = scaled_dot_product_attention(q, k, v)  # imported by name
        else:
            y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.proj(merge(y))


class Stack(nn.Module):
    """Blocks on a sequence, batch norm between them: a forward in training mode changes buffers."""

    def __init__(self, *attentions):
        super().__init__()
        self.blocks, self.bn = nn.ModuleList(map(Block, attentions)), nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        for block in self.blocks:
            x = self.drop(self.bn(block(x).mT).mT)
        return x


class CrossAttention(nn.Module):
    """diffusers' kind: the same class serves self and cross attention, with grouped keys."""

    def __init__(self, key_heads=2):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.to_kv, self.key_heads = nn.Linear(WIDTH, 2 * key_heads * (WIDTH // HEADS)), key_heads

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        k, v = (split(part, self.key_heads) for part in self.to_kv(context).chunk(2, -1))
        q = split(self.to_q(hidden_states))
        y = torch._C._nn.scaled_dot_product_attention(q, k, v, attention_mask, enable_gqa=True)
        return self.to_out(merge(y))


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(), CrossAttention()

    def forward(self, x, context, mask=None):
        x = x + self.attn1(x)
        return x + self.attn2(x, encoder_hidden_states=context, attention_mask=mask)


class Naive(TorchFunctionMode):
    """Inside the block each call of attention is the formula in float64: softmax((s log n + b) z) v.

    Args:
        layers: (s, b, visible) of each call in turn: s and b (H,), visible broadcast to (B, H, N, S) from what the test
            knows, not from the call's masks. None for a call that stays as it is.
    """

    def __init__(self, *layers):
        super().__init__()
        self.layers = list(layers)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (scaled_dot_product_attention, F.multi_head_attention_forward):
            return func(*args, **kwargs)
        layer = self.layers.pop(0)
        if layer is None:
            return func(*args, **kwargs)
        if func is scaled_dot_product_attention:
            return naive_attention(*args[:3], *layer, kwargs.get("scale"))[0]
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        return naive_multihead(layer, **given.arguments)


def naive_attention(q, k, v, s, b, visible, scale=None):
    """Output and weights of q (B, H, N, D), k and v (B, K, S, D)."""
    groups = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
    visible = visible.expand(*q.shape[:-1], k.shape[-2])
    log_n = visible.sum(-1, keepdim=True).clamp(min=1).double().log()
    z = (s.double().view(-1, 1, 1) * log_n + b.double().view(-1, 1, 1)) * (q @ k.mT)
    weights = torch.where(visible, z * (q.shape[-1] ** -0.5 if scale is None else scale), -math.inf).softmax(-1)
    return weights @ v, weights


def naive_multihead(
    layer, query, key, value, num_heads, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, need_weights,
    average_attn_weights, q_proj_weight, k_proj_weight, v_proj_weight, **rest,
):  # fmt: skip
    """Of inputs (N or S, B, E); the masks in rest are not read."""
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if in_proj_weight is None else in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    inputs = [x if x.ndim == 3 else x[:, None] for x in (query, key, value)]
    heads = [
        split(F.linear(x.transpose(0, 1), w, b), num_heads) for x, w, b in zip(inputs, weights, biases, strict=True)
    ]
    output, shown = naive_attention(*heads, *layer)
    output = F.linear(merge(output).transpose(0, 1), out_proj_weight, out_proj_bias)
    shown = (shown.mean(1) if average_attn_weights else shown) if need_weights else None
    return (output, shown) if query.ndim == 3 else (output[:, 0], None if shown is None else shown[0])


def randomise(model, seed=7):
    """Give every scale of a converted model values of its own; return them as (s, b) in the order of the modules."""
    generator, found = torch.Generator().manual_seed(seed), []
    for module in model.modules():
        scale = module._modules.get("ssmax")
        if scale is not None:
            with torch.no_grad():
                scale.s.copy_(0.2 + 0.6 * torch.rand(scale.s.shape, generator=generator))
                if scale.b is not None:
                    scale.b.copy_(0.3 * torch.rand(scale.s.shape, generator=generator))
            found.append((scale.s.detach(), torch.zeros_like(scale.s) if scale.b is None else scale.b.detach()))
    return found
