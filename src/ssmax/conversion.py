"""convert, revert, converted: for transformers models and for any other torch.nn.Module."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from torch import nn

from ssmax import modules
from ssmax.arguments import check_flag
from ssmax.modules.conversion import Options
from ssmax.modules.whole import whole_or_not_at_all


@whole_or_not_at_all()
def convert(
    model: Any,
    init: str | float = "matched",
    *,
    train_length: int | None = None,
    bias: bool | None = None,
    layers: Iterable[int | str] | None = None,
    law: str = "ssmax",
    law_parameters: dict[str, float] | None = None,
    example: Any = None,
    cross: bool = False,
) -> Any:
    """Convert a softmax model to SSMax, in place: softmax((s log n + b) z) in each chosen layer (arXiv 2501.19399).

    A transformers model is converted as a whole: its class, config and checkpoints become those of
    an SSMax model. In any other torch.nn.Module the attention modules change. These are the modules
    whose forward calls torch's scaled_dot_product_attention, which one forward of the example
    finds, and nn.MultiheadAttention (also in nn.TransformerEncoder, nn.TransformerDecoder and
    nn.Transformer), which needs no example. Each gets a submodule ssmax, an SSMaxScale with float32
    s and b for each head.

    n follows from the arguments of the call. is_causal means that query i sees the keys 0 to i,
    also if N and S differ. Masks are bool, or 0 and -inf. A converted module that makes no such
    call in a forward raises ValueError, so that it never computes softmax silently.

    Args:
        model: a transformers model, also one that PEFT wraps, or any torch.nn.Module that is not
            yet wrapped for training (DDP, FSDP). An adapter saved by PEFT holds s and b too; with
            "ssmax" in modules_to_save each adapter learns its own.
        init: "matched": s = matched_scale(train_length) without bias, on average as sharp as before
            (the paper's start). "identity": s = 0 and b = 1, the same model, ready to learn. Or a
            number for s.
        train_length: training length for "matched", in tokens. Default for transformers models:
            max_position_embeddings.
        bias: learn b as well. Default: only with "identity".
        layers: attention to convert, by the names of named_modules; names may include cross
            attention. Default: all self-attention (in transformers models, layers with full
            attention). For decoder-only language models also indices. Without names, only the
            language model is converted, not a vision or audio tower.
        law: law of n, for transformers models: "ssmax", or another of ssmax.laws, without init and
            bias. Learned: "ssmax-power" (s (log n)^gamma), "query-aware" (TabICLv2's) and
            "temperature" (a control without n). Fixed: "ssmax-fixed" (log n), "qwen-1", "yarn",
            "llama-4" and "ministral-3". See docs/laws.md.
        law_parameters: parameters of such a law; learned ones start there. The training length
            defaults to train_length or the config's, s to what makes the law on average as sharp as
            Softmax over it.
        example: for other modules, the inputs of one forward: positional as a tuple, by keyword as
            a dict. The forward runs on a copy in eval mode and leaves no trace. Only attention that
            runs in it is found.
        cross: convert cross attention too. With an example, this is attention whose keys and
            queries are made from different inputs. Without one: nn.TransformerDecoderLayer's
            multihead_attn, and attention with kdim or vdim.

    Returns:
        The same model. Its weights stay. Its state_dict also has the scales: loading it into an
        unconverted model, or an unconverted one into it, fails because of the keys.

    Raises:
        TypeError: model is not a torch.nn.Module; bias or cross is not a bool.
        ValueError: nothing to convert, a converted model, an argument that does not fit, or
            attention for which SSMax is not defined (a bias on the logits, keys that are not
            tokens, another law of n). The model stays as it was.

    Exclude s and b from weight decay. A module that is called twice in a forward uses one scale for
    both and warns.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2)
        >>> ssmax.convert(encoder, train_length=512)
        >>> ssmax.convert(my_gpt, "identity", example=(tokens,))
    """
    check_flag(cross, "cross")
    if bias is not None:
        check_flag(bias, "bias")
    options = Options(init, train_length, bias, _listed(layers), law, law_parameters or {}, example, cross)
    whole = _transformers_model(model)
    if whole is not None:
        from ssmax import hf

        hf.conversion.convert(whole, options)
    elif isinstance(model, nn.Module):
        _refuse_inner(model)
        modules.convert(model, options)
    else:
        raise TypeError(f"convert needs a torch.nn.Module, got {type(model).__name__}")
    return model


def _listed(layers):
    """Return layers as a list of names and indices, or None."""
    if layers is None:
        return None
    listed = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str | bytes) else [None]
    if any(isinstance(x, bool) or not isinstance(x, Integral | str) for x in listed):
        raise ValueError(f"layers must be a list of names or indices, as in ['encoder.0'] or [0, 3]; got {layers!r}")
    return [x if isinstance(x, str) else int(x) for x in listed]


def _refuse_inner(model):
    inner = next((f"{name} ({type(m).__name__})" for name, m in model.named_modules() if _transformers_model(m)), None)
    if inner is not None:
        raise ValueError(
            f"{type(model).__name__} holds a transformers model, {inner}; convert that one, as in ssmax.convert(model.{inner.split()[0]})"
        )


@whole_or_not_at_all()
def revert(model: Any) -> Any:
    """Remove SSMax from a model, in place: classes, config and state_dict of the softmax model, bit for bit.

    Save a reverted model to a new folder. In the folder of a converted model, the card and the code file
    of that model would stay.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not converted.

    Example:
        >>> ssmax.revert(ssmax.convert(model))  # the model as it was
    """
    whole = _transformers_model(model)
    if whole is None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"revert needs a torch.nn.Module, got {type(model).__name__}")
        modules.revert(model)
    else:
        from ssmax import hf

        hf.conversion.revert(whole)
    return model


@contextmanager
def converted(model: Any, init: str | float = "matched", **options: Any) -> Iterator[Any]:
    """Convert a model inside a with block, and revert it at the end, also if the block raises.

    Arguments and errors are those of ssmax.convert. What s and b learn inside the block is lost at
    its end.

    Example:
        >>> with ssmax.converted(model, "matched"):
        ...     logits = model(tokens).logits
    """
    convert(model, init, **options)
    try:
        yield model
    finally:
        revert(model)


def _transformers_model(model: Any) -> Any:
    """Return the model itself, or the one that PEFT wraps, if it is a transformers model; else None."""
    loaded, peft = sys.modules.get("transformers.modeling_utils"), sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        model = model.get_base_model()
    return model if loaded is not None and isinstance(model, loaded.PreTrainedModel) else None
