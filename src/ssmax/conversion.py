"""convert, revert, converted: the one door for transformers models and for any other torch.nn.Module."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ssmax import modules
from ssmax.modules.whole import whole_or_not_at_all

__all__ = ["convert", "converted", "revert"]


@whole_or_not_at_all()
def convert(
    model: Any,
    init: str | float = "matched",
    *,
    train_length: int | None = None,
    bias: bool | None = None,
    layers: list[int] | list[str] | None = None,
    law: str = "ssmax",
    law_parameters: dict[str, float] | None = None,
    example: Any = None,
    cross: bool = False,
) -> Any:
    """Turn a Softmax model into an SSMax model, in place: softmax((s log n + b) z) in each chosen layer (arXiv 2501.19399).

    A transformers model is converted as a whole: class, config and checkpoints become those of an SSMax model. Of any
    other torch.nn.Module the attention modules change: those whose forward calls torch's scaled_dot_product_attention,
    which one forward of the example finds, and nn.MultiheadAttention (so nn.TransformerEncoder, nn.TransformerDecoder and
    nn.Transformer), which is found without. Each gets a submodule ssmax, an SSMaxScale with float32 s and b per head.

    n is what torch's arguments say: is_causal shows query i the keys 0 to i (also where N and S differ), masks are bool,
    or 0 and -inf. A converted module whose call does not come in a forward raises ValueError, so that it never computes
    Softmax in silence.

    Args:
        model: a transformers model, also one that PEFT wraps (an adapter's own file holds no s and b: save the model, or name
            "ssmax" in modules_to_save), or any torch.nn.Module that was not wrapped for training yet (DDP, FSDP).
        init: "matched": s = matched_scale(train_length) and no bias, the paper's start, on average as sharp as before;
            "identity": s = 0 and b = 1, exactly the same model, and it can learn; or a number for s.
        train_length: what "matched" is matched to; a transformers model's default is its max_position_embeddings, other
            modules have none.
        bias: learn b as well; default as init says.
        layers: which attention to convert: names as in named_modules, cross attention included; default all self-attention
            (of transformers models that which attends in full). Of decoder-only language models indices too, and without
            names the language model alone is converted, not a vision or audio tower.
        law: for transformers models: "ssmax", or another of ssmax.laws, for which init and bias have no meaning. Learned are
            "ssmax-power" (s (log n)^gamma), "query-aware" (TabICLv2's) and "temperature" (a control without n), fixed
            "ssmax-fixed" (log n), "qwen-1", "yarn", "llama-4" and "ministral-3". docs/laws.md says which to use.
        law_parameters: of such a law; what is learned starts there. The training length defaults to train_length or the
            config's, s to matched_scale of it.
        example: for other modules: the positional inputs of one forward, a tuple, or its keyword inputs, a dict. The
            forward runs on a copy in eval mode and leaves no trace. Only what runs in it is found.
        cross: convert cross attention too. In an example that is attention whose keys are not made from the input that its
            queries are made from; without one, nn.TransformerDecoderLayer's multihead_attn and what has kdim or vdim.

    Returns:
        The same model. Weights stay. A state_dict has the scales more: loading it into an unconverted model, or a plain
        one into a converted model, fails by its keys.

    Raises:
        TypeError: not a torch.nn.Module.
        ValueError: nothing to convert, already converted, an argument that does not fit, attention that SSMax is not
            defined for (a bias on the logits, keys that are no tokens, a law of n of its own); the model stays as it was.

    Leave s and b out of weight decay. A module that is called twice in a forward has one scale for both, and a warning says so.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2)
        >>> ssmax.convert(encoder, train_length=512)
        >>> ssmax.convert(my_gpt, "identity", example=(tokens,))
    """
    whole = _transformers_model(model)
    if whole is not None:
        if example is not None:
            raise ValueError("example is for modules that are no transformers models; leave it out")
        from ssmax import hf

        options: dict[str, Any] = {"train_length": train_length, "bias": bias, "layers": layers, "cross": cross}
        hf.convert(whole, init, law=law, law_parameters=law_parameters, **options)
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert needs a torch.nn.Module, got {type(model).__name__}")
    if law != "ssmax" or law_parameters:
        raise ValueError("law and law_parameters are for transformers models; other modules take s log n + b")
    inner = next((f"{name} ({type(m).__name__})" for name, m in model.named_modules() if _transformers_model(m)), None)
    if inner is not None:
        raise ValueError(
            f"{type(model).__name__} holds a transformers model, {inner}; convert that one, as in ssmax.convert(model.{inner.split()[0]})"
        )
    options: dict[str, Any] = {
        "train_length": train_length,
        "bias": bias,
        "layers": layers,
        "example": example,
        "cross": cross,
    }
    return modules.convert(model, init, **options)


@whole_or_not_at_all()
def revert(model: Any) -> Any:
    """Take SSMax out again, in place: the softmax model's classes, config and state_dict, bit for bit.

    Raises:
        ValueError: the model is not converted.
    """
    whole = _transformers_model(model)
    if whole is None:
        return modules.revert(model)
    from ssmax import hf

    hf.revert(whole)
    return model


@contextmanager
def converted(model: Any, init: str | float = "matched", **options: Any) -> Iterator[Any]:
    """Convert on entry, revert on exit; arguments as ssmax.convert."""
    convert(model, init, **options)
    try:
        yield model
    finally:
        revert(model)


def _transformers_model(model: Any) -> Any:
    """The model itself, or the one that PEFT wraps, where it is a transformers model; else None."""
    loaded, peft = sys.modules.get("transformers.modeling_utils"), sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        model = model.get_base_model()
    return model if loaded is not None and isinstance(model, loaded.PreTrainedModel) else None
