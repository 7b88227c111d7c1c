"""Tiny random models of any family of transformers."""

import inspect

import torch
import transformers
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Whatever a configuration may call its sizes; each takes those it has.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff"), 40),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(
        ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim", "hidden_size_per_layer_input"), 8
    ),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
}


def tiny_config(family, **changes):
    config_type = CONFIG_MAPPING[family]
    names = inspect.signature(config_type.__init__).parameters
    return config_type(**{name: value for name, value in SIZES.items() if name in names} | changes)


def tiny_model(family, **changes):
    torch.manual_seed(0)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return getattr(transformers, name)(tiny_config(family, **changes)).eval()


def implementations(model):
    # Families with sinks or a softcap run on eager alone (and on kernels that know them).
    config = model.config.get_text_config()
    special = hasattr(config, "attn_logit_softcapping") and config.attn_logit_softcapping is not None
    if special or any(hasattr(module, "sinks") for module in model.modules()):
        return ["eager"]
    return ["sdpa", "eager", "standin_of_fa2"]


def flash_standin(module, query, key, value, attention_mask, scaling=None, softcap=None, is_causal=None, **kwargs):
    """What FlashAttention computes from a 2-D mask, a window and restarting positions."""
    rows, keys = query.shape[2], key.shape[2]
    position = torch.arange(keys - rows, keys)[:, None]
    seen = torch.arange(keys) <= position
    if kwargs.get("sliding_window") is not None:
        seen = seen & (torch.arange(keys) > position - kwargs["sliding_window"])
    seen = seen.expand(query.shape[0], 1, rows, keys)
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None]
    elif query.shape[0] == 1 and rows == keys and kwargs.get("position_ids") is not None:
        document = (kwargs["position_ids"][0].diff(prepend=torch.tensor([-1])) != 1).cumsum(0)
        seen = seen & (document[:, None] == document)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("standin_of_fa2", flash_standin)
AttentionMaskInterface.register("standin_of_fa2", flash_attention_mask)
