"""Writes modeling_ssmax.py, the code with which a saved model loads if the package ssmax is not installed."""

import inspect
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ssmax.hf.portable import pieces
from ssmax.laws import LAWS, LawScale, QueryAwareScale
from ssmax.nn import SSMaxScale
from ssmax.private import saved_name
from ssmax.query_scale import QueryScale
from ssmax.runs.files import write_atomically
from ssmax.versions import SUPPORTED

CODE_FILE = "modeling_ssmax"
PREFIX = "SSMax"

TEXT = '''"""{family} with Scalable-Softmax (arXiv 2501.19399): queries are multiplied by {formula}; n is how many keys a query sees.

Needs transformers {version} or later and nothing else. Where the package ssmax is installed, that is used instead.
"""

import functools
import inspect
{math}import pathlib
import threading

import torch
import transformers
from torch import nn
from transformers import (
    {imports},
)
{renamed}from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

# What config.ssmax says of the law that is computed here, and the attention modules that are scaled, each with what makes its scale.
LAW = {law}
SCALES = {scales}
LAST = threading.local()  # used: the scale that was called last in this thread
{scale}

{dispatch}

try:  # the same model, on more attention implementations
    from ssmax.hf.checkpoint import (
        {saved},
    )
except ImportError:
    install()

    class {config}({base_config}):
        model_type = "ssmax_{model_type}"

{models}

{registered}    # Its server looks models up by name, in either of two objects that the module transformers may be.
    for kind in (
        {classes},
    ):
        setattr(type(transformers), kind.__name__, kind)
{renaming}'''
RENAMED = "from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping\n"
RENAMING = """        # It looks up by name, too, how old weights are called now.
        renamings = get_checkpoint_conversion_mapping(kind.__name__.removeprefix("SSMax"))
        if renamings is not None:
            register_checkpoint_conversion_mapping(kind.__name__, renamings, overwrite=True)
"""
REGISTERED = """    # Where transformers builds one model inside of another, it looks the inner one up.
{lines}
"""
DISPATCH = (
    pieces.wide,
    pieces.visible_keys,
    pieces.attend,
    pieces.note,
    pieces.require,
    pieces.require_inside,
    pieces.carry,
    pieces.install,
    pieces.Converted,
)
MODEL = """    class {prefix}{name}(Converted, {name}):
        config_class = {config}"""


def write_code(
    model: PreTrainedModel, base: type[PreTrainedModel], heads: dict[str, type[PreTrainedModel]], folder: Path
) -> None:
    """Write the code file of a converted model into a folder.

    Args:
        model: a converted model. The code is made from its classes and modules, never from its
            config, which may come from an unknown source.
        base: its softmax class, which may be none of those that an Auto class loads.
        heads: name of each Auto class that knows the family, and the class of transformers that it
            loads.
        folder: folder of the saved model.
    """
    write_atomically(folder / f"{CODE_FILE}.py", _code(model, base, heads))


def formula(scale: Any) -> str:
    """Return the multiplier of a scale as a formula."""
    if not isinstance(scale, SSMaxScale):
        return LAWS[scale.law].formula
    return "s log n" if getattr(scale, "bias", None) is None else "s log n + b"


def _code(model, base, heads):
    inside = {saved_name(name): module for name, module in model.base_model.named_modules()}
    scaled = {name: module.ssmax for name, module in inside.items() if hasattr(module, "ssmax")}
    scale = next(iter(scaled.values()))
    if not isinstance(scale, QueryScale):
        raise ValueError(f"a model is saved with scales of ssmax, got {type(scale).__name__}, which nothing could load")
    base_config: type[PreTrainedConfig] = model.config_class.__bases__[0]
    classes, config = sorted({kind.__name__ for kind in (base, *heads.values())}), f"{PREFIX}{base_config.__name__}"
    renames = any(get_checkpoint_conversion_mapping(name) is not None for name in classes)
    lines = [f"    {auto}.register({config}, {PREFIX}{head.__name__}, exist_ok=True)" for auto, head in heads.items()]
    return TEXT.format(
        family=base_config.__name__.removesuffix("Config"),
        formula=formula(scale),
        version=".".join(map(str, SUPPORTED["transformers"][0])),
        math="" if isinstance(scale, SSMaxScale) else "import math\n",
        imports=",\n    ".join(sorted({base_config.__name__, *heads, *classes})),
        law=_named(scale),
        scales=_scales({name: _size(one) for name, one in scaled.items()}),
        scale=_scale(scale),
        dispatch=_sources(*DISPATCH),
        saved=",\n        ".join([config, *(f"{PREFIX}{name}" for name in classes)]),
        config=config,
        base_config=base_config.__name__,
        model_type=base_config.model_type,
        models="\n\n".join(MODEL.format(prefix=PREFIX, name=name, config=config) for name in classes),
        renamed=RENAMED if renames else "",
        renaming=RENAMING if renames else "",
        registered=REGISTERED.format(lines="\n".join(lines)) if lines else "",
        classes=",\n        ".join(f"{PREFIX}{name}" for name in classes),
    )


def _sources(*objects):
    return "\n\n".join(inspect.getsource(one) for one in objects)


def _size(scale):
    """Return the argument of the code file's class Scale: heads, or heads, head size and hidden size."""
    if isinstance(scale, QueryAwareScale):
        return scale.num_heads, scale.head_size, scale.of_n[0].out_features
    return max((part.numel() for part in scale.parameters()), default=0)


def _named(scale):
    """Return the entries by which the code file recognises its law in config.ssmax."""
    if isinstance(scale, SSMaxScale):
        return {"law": "ssmax", "bias": scale.bias is not None}
    return {"law": scale.law, **getattr(scale, "fixed", {})}


def _scale(scale):
    """Return the source of starting values, the law's function, and class Scale."""
    if isinstance(scale, LawScale):
        start, piece = scale.starts, pieces.LawScale if scale.starts else pieces.FixedScale
    else:
        piece = pieces.Scale if isinstance(scale, SSMaxScale) else pieces.QueryAwareScale
        start = {"s": scale.init_s} | ({} if getattr(scale, "bias", 0) is None else {"b": scale.init_b})
    note = "# What a new model starts with; a checkpoint brings its own.\nSTART = "
    law = _law(scale) if isinstance(scale, LawScale) else ""
    kept = [] if piece is pieces.FixedScale else [pieces.Learned]
    module = _sources(*kept, piece).replace(f"class {piece.__name__}", "class Scale")
    return "\n\n".join([f"{note}{start}\n" if start else "", *([law] if law else []), module])


def _law(scale):
    """Return the source of the law's function, and of a function of n and the learned parameters that calls it."""
    law = LAWS[scale.law]
    name, own = law.function.__name__, getattr(law.function, "__module__", None) not in ("torch", None)
    if not name.isidentifier():
        raise ValueError(f"law {scale.law!r} is a {name}, which a saved model cannot carry; write it as a def")
    fixed = [f"{name}={value!r}" for name, value in scale.fixed.items()] + ["**learned"] * bool(scale.starts)
    call = ", ".join(["n" if law.of == "n" else "(n - 1)", *fixed])
    docstring = f'"""{law.formula}: {law.source}."""'
    arguments = "n, **learned" if scale.starts else "n"
    source = f"{_sources(law.function)}\n\n" if own else ""
    called = name if own else f"torch.{name}"
    return f"{source}def multiplier({arguments}):\n    {docstring}\n    return {called}({call})\n"


def _scales(sizes):
    """Return a dictionary as source, with one line for layers whose names differ only by their number."""
    groups: dict[tuple[str, int], list[int]] = {}
    single = {}
    for name, size in sizes.items():
        numbers = re.findall(r"\.(\d+)\.", name)
        if len(numbers) == 1:
            groups.setdefault((re.sub(r"\.\d+\.", ".{i}.", name), size), []).append(int(numbers[0]))
        else:
            single[name] = size
    parts = [f'f"{name}": {size} for i in {_numbers(found)}' for (name, size), found in groups.items()]
    if single or len(parts) > 1:
        return (
            "{" + ", ".join([*(f"**{{{part}}}" for part in parts), *(f"{n!r}: {s}" for n, s in single.items())]) + "}"
        )
    return "{" + parts[0] + "}"


def _numbers(found):
    whole = range(found[0], found[-1] + 1)
    return f"range({whole.start}, {whole.stop})".replace("(0, ", "(") if found == list(whole) else repr(tuple(found))
