"""Writes mlx_ssmax.py, with which mlx-lm runs a saved model: mlx_model.py, for the model's family."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ssmax.hf.layers import FULL, language_layers
from ssmax.nn import SSMaxScale
from ssmax.runs.files import write_atomically

MLX_FILE = "mlx_ssmax.py"
MODULES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # family -> mlx-lm's module
ROPES = ("default", "linear", "llama3")


def write_mlx(model: PreTrainedModel, folder: Path) -> None:
    """Write the file for mlx-lm into a folder and name it in the model's config. Do neither if mlx-lm cannot run the model."""
    if why_not_mlx(model):
        model.config.__dict__.pop("model_file", None)
        return
    module = MODULES[_family(model)]
    text = Path(__file__).with_name("mlx_model.py").read_text()
    write_atomically(folder / MLX_FILE, text.replace("llama as family", f"{module} as family"))
    model.config.model_file = MLX_FILE


def why_not_mlx(model: PreTrainedModel) -> str | None:
    """Return why mlx-lm with the file would not compute a converted model exactly, or None."""
    config: Any = model.config
    family = _family(model)
    if family not in MODULES or not model.can_generate():
        return f"the class is none of {', '.join(MODULES)} with a language model's head"
    layers = language_layers(model).values()
    laws = {scale.law for layer in layers if (scale := getattr(layer.module, "ssmax", None)) is not None}
    rope = config.rope_parameters
    if not laws:
        return "it is not converted"
    if laws != {SSMaxScale.law}:
        return f"the law is {', '.join(sorted(laws))}, not s log n + b"
    if family != "mistral" and any(layer.kind != FULL for layer in layers):
        return f"mlx-lm does not know windows of {family}"
    if rope.get("rope_type", "default") not in ROPES or rope.get("partial_rotary_factor", 1) != 1:
        return f"RoPE is {rope}, not one of the types {', '.join(ROPES)} on whole heads"
    if config.hidden_act != "silu":
        return f"the activation is {config.hidden_act!r}, not 'silu'"
    if family == "qwen3" and config.attention_bias:
        return "mlx-lm does not know biases in Qwen 3's projections"
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised or not all(tensor.is_floating_point() for tensor in model.state_dict().values()):
        return "it is quantised; mlx_lm.convert quantises the model before that"
    return None


def _family(model):
    return model.config.model_type.removeprefix("ssmax_")
