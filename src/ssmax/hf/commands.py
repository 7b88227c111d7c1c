"""ssmax convert and ssmax inspect: models on disk."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ssmax.errors import UserError
from ssmax.hf.conversion import convert
from ssmax.hf.layers import language_layers

__all__ = ["convert_folder", "describe"]

# What belongs to a model beside its weights and config.
COMPANIONS = ("token", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece", "preprocessor")


def convert_folder(source: str, target: Path, *, dry_run: bool, **options: Any) -> list[str]:
    """Convert the model in source and save it, whole or not at all, as the new folder target; return what was done.

    Raises:
        UserError: target exists, source is no model, or it cannot be converted.
    """
    if target.exists():
        raise UserError(f"{target} exists already; give a new folder")
    model = _load(source)
    try:
        convert(model, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
    lines = describe(model)
    if dry_run:
        return [*lines, "dry run: nothing was written"]
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary)
        for path in sorted(Path(source).iterdir()) if Path(source).is_dir() else ():
            if path.is_file() and path.name.startswith(COMPANIONS):
                shutil.copy2(path, temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [*lines, f"saved as {target.resolve()}"]


def describe(model: PreTrainedModel | str) -> list[str]:
    """Return lines that say which layers carry SSMax, by which law, and s and b of each head."""
    model = _load(model) if isinstance(model, str) else model
    recipe = getattr(model.config, "ssmax", None)
    layers = _layers(model)
    lines = [f"{type(model).__name__}: {len(layers)} self-attention layers that can carry SSMax"]
    if recipe is None:
        return [*lines, "not converted: plain softmax"]
    lines.append(f"law {recipe['law']}, init {recipe['init']}, converted by ssmax {recipe['version']}")
    lines.append(f"{'layer':>5}  {'kind':<18} s of each head" + (" / b of each head" if recipe["bias"] else ""))
    for index, layer in sorted(layers.items()):
        scale = getattr(layer.module, "ssmax", None)
        if scale is None:
            lines.append(f"{index:>5}  {layer.kind:<18} softmax")
            continue
        s, b = (None if p is None else " ".join(f"{x:.4f}" for x in p.tolist()) for p in (scale.s, scale.b))
        lines.append(f"{index:>5}  {layer.kind:<18} {s}" + (f" / {b}" if b is not None else ""))
    return lines


def _layers(model):
    try:
        return language_layers(model)
    except ValueError as error:
        raise UserError(str(error)) from error


def _load(source):
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(source)
        return AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=getattr(config, "dtype", None) or "auto"
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source} cannot be loaded as a causal language model: {reason[:300]}") from error
