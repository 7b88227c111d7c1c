"""Export of a converted model to a GGUF file that stock llama.cpp runs exactly.

llama.cpp has no SSMax. Its architecture mistral3 multiplies queries by 1 + beta log(floor(p / L) +
1) at position p. The export sets L = 1, multiplies the rows of the query projection by s, and stores 1 / beta in
a tensor of its own (attn_q.scale), because it does not fit into weights of 16 or 8 bits. Since n =
p + 1, the product is s log n + s / beta, with a relative error of 1 / (beta log n). For weights of 16 or 8 bits,
the rows are also multiplied by a power of two; that tensor is divided by it.

RoPE whose frequencies differ from the default ones is written as a factor for each frequency (rope_freqs).
"""

import importlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ssmax.errors import UserError
from ssmax.hf.layers import FULL, language_layers
from ssmax.hf.loading import load_model
from ssmax.nn import SSMaxScale
from ssmax.runs.failures import user_errors
from ssmax.runs.files import check_destination, rename_new
from ssmax.serving.gguf_tokenizer import add_tokenizer
from ssmax.versions import INSTALL

DTYPES = ("f32", "f16", "q8_0")
ARCHITECTURE = "mistral3"
FAMILIES = ("llama", "mistral", "qwen2")
ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not change with the length of the text
BETA = 2.0**24  # a power of two, so that dividing by it and multiplying by it do not round
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OWN_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
WAY_OUT = "convert with init 'matched' instead of 'identity', or calibrate without b (--inits matched --no-bias)"


def export_gguf(source: str, target: Path, dtype: str = "f16", *, dry_run: bool = False) -> list[str]:
    """Write a model and its tokenizer to a new GGUF file.

    Args:
        source: folder of a model and its tokenizer. A softmax model of the same families is written
            as a softmax model.
        target: new file.
        dtype: dtype of the matrices: "f32", "f16" or "q8_0"; vectors stay float32.
        dry_run: check the model and its tokenizer, and write nothing.

    Returns:
        Lines that say what was done.

    Raises:
        UserError: target exists, the package gguf is missing, or llama.cpp would not run the model
            or its tokenizer exactly.
    """
    check_destination(target, new=True)
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    logging.disable_progress_bar()
    with user_errors():
        model = load_model(source)
        ssmax, factors = _query_factors(model)
    done = f"{type(model).__name__}: " + (f"s log n in {len(factors)} layers" if ssmax else "plain softmax")
    gguf = _package()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
    _add_settings(writer, gguf, model.config, ssmax=ssmax, dtype=dtype)
    done += f", matrices in {dtype}, {add_tokenizer(writer, gguf, Path(source), model.config.vocab_size)}"
    if dry_run:
        return [done, "dry run: nothing was written"]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _add_tensors(writer, gguf, model, factors, ssmax=ssmax, dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        rename_new(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return [done, f"saved as {target.resolve()}"]


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(f"the package 'gguf' is missing; {INSTALL.replace('NAME', 'export')} brings it") from error


def _query_factors(model: PreTrainedModel) -> tuple[bool, list[Tensor]]:
    """Return whether the model is converted, and what each layer's query heads are multiplied by, float64.

    Raise ValueError with the reason if llama.cpp cannot run the model.
    """
    config: Any = model.config
    family = config.model_type.removeprefix("ssmax_")
    layers = [layer for _, layer in sorted(language_layers(model).items())]
    obstacle = next(
        (f"it has {name} (QK-norm), which would undo s in the query projection" for layer in layers for name in OWN_NORMS if hasattr(layer.module, name)), None
    ) or (
        f"its family {family} is none of {', '.join(FAMILIES)}"
        if family not in FAMILIES
        else "it has windowed layers, and llama.cpp applies the law to all layers"
        if any(layer.kind != FULL for layer in layers)
        or (family == "mistral" and config.sliding_window)  # for which Mistral ignores layer_types
        else _other_obstacle(model, config, layers)
    )  # fmt: skip
    if obstacle:
        raise ValueError(f"stock llama.cpp does not run this model exactly: {obstacle}")
    found = [getattr(layer.module, "ssmax", None) for layer in layers]
    ssmax = any(found)
    for index, scale in enumerate(found):
        reason = _refused(scale) if ssmax else None
        if reason:
            raise ValueError(f"stock llama.cpp does not run this model exactly: layer {index} {reason}")
    # YaRN multiplies queries and keys by a factor of its own.
    rotary: Any = model.base_model.rotary_emb
    squared = rotary.attention_scaling**2
    return ssmax, [_s(scale, layer.heads) * squared for scale, layer in zip(found, layers, strict=True)]


def _refused(scale):
    if scale is None:
        return "is not converted, and llama.cpp applies the law to all layers; convert all of them"
    if not isinstance(scale, SSMaxScale):
        return None if scale.law == "ssmax-fixed" else f"has law {scale.law}; 'ssmax' without b can be exported"
    if scale.b is not None:
        return f"has a bias b, which llama.cpp's law does not have; {WAY_OUT}"
    return None if torch.isfinite(scale.s).all() else "has an s that is not finite"


def _s(scale, heads):
    return (
        torch.ones(heads, dtype=torch.float64)
        if not isinstance(scale, SSMaxScale)
        else scale.s.detach().double().expand(heads)
    )


def _other_obstacle(model, config, layers):
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPES:
        return f"its RoPE of type {kind!r} changes with the length of the text, or is unknown; known are {', '.join(ROPES)}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act!r}, not 'silu'"
    for layer in layers:
        if layer.module.scaling != layer.module.head_dim**-0.5:
            return "its logits are not divided by the root of the head size"
    for name, module in model.named_modules():
        if name.endswith("_proj") and (type(module) is not nn.Linear or not module.weight.is_floating_point()):
            return f"{name} is quantised or not a linear layer"
    return None


def _add_settings(writer, gguf, config, *, ssmax, dtype):
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[dtype])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_vocab_size(config.vocab_size)
    if ssmax:
        writer.add_description("Scalable-Softmax, s log n, written as the attention temperature of Mistral 3")
        writer.add_rope_scaling_orig_ctx_len(1)
        writer.add_attn_temperature_scale(BETA)


def _add_tensors(writer, gguf, model, factors, *, ssmax, dtype):
    def add(name, tensor, as_matrix=False):
        array = tensor.detach().float().numpy()
        kind = {"f16": "F16", "q8_0": "Q8_0"}.get(dtype) if as_matrix else None
        if kind is None:
            writer.add_tensor(name, array)
            return
        # llama.cpp's own converter also falls back to f16 if a row is not a multiple of q8_0's block of 32.
        kind = "F16" if kind == "Q8_0" and array.shape[-1] % 32 else kind
        quantised = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(array, quantised), raw_dtype=quantised)

    inner, head = model.base_model, model.get_output_embeddings().weight
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        add("rope_freqs.weight", _divisors(inner.rotary_emb.inv_freq, rope["rope_theta"]))
    add("token_embd.weight", inner.embed_tokens.weight, as_matrix=True)
    add("output_norm.weight", inner.norm.weight)
    if head is not inner.embed_tokens.weight:
        add("output.weight", head, as_matrix=True)
    config = model.config
    pairs = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for index, layer in enumerate(inner.layers):
        factor = factors[index]
        shift = _shift(_by_head(layer.self_attn.q_proj.weight, factor)) if ssmax else 1.0
        for theirs, ours in NORMS.items():
            add(f"blk.{index}.{ours}.weight", layer.get_submodule(theirs).weight)
        for theirs, ours in LINEARS.items():
            for part, tensor in layer.get_submodule(theirs).named_parameters():
                value = tensor
                if ours == "attn_q":
                    # attn_q.scale multiplies the product with the weights; a bias is added after that.
                    value = _by_head(value, factor * (shift if part == "weight" else 1 / BETA if ssmax else 1))
                if ours in pairs:
                    value = _interleaved(value, pairs[ours])
                add(f"blk.{index}.{ours}.{part}", value.contiguous(), as_matrix=part == "weight")
        if ssmax:
            add(f"blk.{index}.attn_q.scale", torch.full((1,), 1 / (BETA * shift)))


def _divisors(frequencies, theta):
    """Return the numbers by which RoPE's default frequencies are divided."""
    pairs = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    return theta**-pairs / frequencies.double()


def _shift(rows):
    """Return the power of two that brings the largest entry to between 1/2 and 1."""
    return 2.0 ** -math.frexp(rows.abs().max().item())[1]


def _by_head(rows, factors):
    by_head = rows.detach().double().unflatten(0, (len(factors), -1))
    return (by_head * factors.view(-1, *(1,) * (by_head.ndim - 1))).flatten(0, 1)


def _interleaved(rows, heads):
    """Reorder rows for llama.cpp's RoPE, which rotates pairs that lie side by side instead of half a head apart."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
