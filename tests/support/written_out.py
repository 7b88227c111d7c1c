"""Small Llamas, one of them written out in float64 with the oracle's attention."""

import numpy as np
import oracle
import rounding
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


TOKENS = torch.randint(2, 61, (2, 12), generator=torch.Generator().manual_seed(3))


def spread_scales(model):
    """Different s and b in every head, so that a mixed-up head or layer shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ssmax." in name:
                parameter.copy_(0.2 + 0.5 * torch.rand(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits_bound(model, **inputs):
    """What rounding may do to the logits of TOKENS."""
    return rounding.of(lambda: model(TOKENS, use_cache=False, **inputs).logits, draws=8)


def naive_llama(model, tokens, seen=None):
    """A float64 Llama written out: RMSNorm, RoPE, the oracle's attention, gated feed-forward."""
    config, weights = model.config, {k: v.double().numpy() for k, v in model.state_dict().items()}
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x = weights["model.embed_tokens.weight"][tokens.numpy()]
    length = x.shape[1]
    frequency = config.rope_parameters["rope_theta"] ** (-np.arange(0, size, 2) / size)
    angle = np.concatenate([np.outer(np.arange(length), frequency)] * 2, -1)

    def norm(x, w):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * w

    def rotate(x):
        half = np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * np.cos(angle) + half * np.sin(angle)

    def split(x, count):
        return x.reshape(*x.shape[:2], count, size).transpose(0, 2, 1, 3)

    seen = oracle.causal(length, length) if seen is None else seen
    open_keys = np.broadcast_to(seen, (len(x), heads, length, length))
    for i in range(config.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{i}."): v for k, v in weights.items() if f".layers.{i}." in k}
        y = norm(x, w["input_layernorm.weight"])
        q, k, v = (
            split(y @ w[f"self_attn.{p}_proj.weight"].T, c) for p, c in (("q", heads), ("k", groups), ("v", groups))
        )
        s, b = w["self_attn.ssmax.weight"], w["self_attn.ssmax.bias"]
        out = oracle.attention(rotate(q), rotate(k), v, s, b, open_keys)
        x = x + out.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1) @ w["self_attn.o_proj.weight"].T
        y = norm(x, w["post_attention_layernorm.weight"])
        gate = y @ w["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
