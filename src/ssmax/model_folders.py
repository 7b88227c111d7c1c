"""ssmax convert, calibrate and inspect: the work of these commands, on folders of models."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ssmax.calibration import Calibration, calibrate, piece_length
from ssmax.conversion import convert
from ssmax.data.sources import documents
from ssmax.errors import RunFailed, UserError
from ssmax.hf.companions import copy_companions
from ssmax.hf.layers import Layer, language_layers, layers_of, named_layers
from ssmax.hf.loading import load_config, load_model, load_tokenizer, quiet
from ssmax.hf.portable.card import write_card
from ssmax.hf.shapes import check_shape, largest_token
from ssmax.hf.spec import ScaleSpec
from ssmax.runs.failures import is_full, user_errors
from ssmax.runs.files import check_destination, write_atomically, written_whole
from ssmax.runs.rows import Row

TEXT_LIMIT = 64 * 2**20  # bytes of text read for a calibration


def convert_folder(source: str, target: Path, *, dry_run: bool, **options: Any) -> list[str]:
    """Convert the model in source and save it, whole or not at all, as the new folder target.

    Args:
        source: folder of a model, or its name on a hub.
        target: new folder.
        dry_run: say what would be done, and write nothing.
        options: options of ssmax.convert.

    Returns:
        Lines that say what was done.

    Raises:
        UserError: target exists, source is not a model, or it cannot be converted.
        RunFailed: the disk is full.
    """
    check_destination(target, new=True)
    quiet()
    model = load_model(source)
    with user_errors():
        convert(model, **options)
    lines = _describe(model)
    if dry_run:
        return [*lines, "dry run: nothing was written"]
    return [*lines, *_save(model, source, target)]


def calibrate_folder(
    source: str, target: Path, texts: str | None, *, theta_factor: float, checkpointing: bool, dry_run: bool, **options
) -> list[str]:
    """Fit s and b of the model in source on texts and save it with calibration.json as the new folder target.

    Args:
        source: folder of a model and its tokenizer.
        target: new folder; it is written only if the fit is better than the model as it was.
        texts: see ssmax.data.sources.documents.
        theta_factor: factor of RoPE's theta, saved with the model.
        checkpointing: recompute activations: less memory, a third more time.
        dry_run: load everything, say what would be done, and stop.
        options: options of ssmax.calibrate.

    Raises:
        UserError: target exists, source is not a model or cannot be converted, or the texts are too
            short.
        RunFailed: a loss is not finite, or the disk is full.
    """
    check_destination(target, new=True)
    quiet()
    config = load_config(source)
    _raise_theta(config, theta_factor)
    with user_errors():
        length = piece_length(config, options["length"])
    tokens = _tokens(source, config, texts, length, options["steps"])
    model = load_model(source, config)
    if checkpointing:
        # transformers 5 has a new name for this method, and warns about the old one.
        with user_errors():
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if dry_run:
        pieces = sum(len(document) // length for document in tokens)
        fits = len(options["inits"]) * len(options["layer_sets"])
        return [
            *_describe(model),
            f"would fit s{' and b' if options['bias'] else ''} {fits} time{'s' * (fits > 1)} in {options['steps']} steps of "
            f"{length:,} tokens, on {len(tokens)} texts with {pieces} such pieces, a quarter of them held out",
            "dry run: nothing was written",
        ]
    try:
        with user_errors():
            found = calibrate(model, tokens, **options)
    except FloatingPointError as error:
        raise RunFailed(str(error)) from error
    if found.chosen is None:
        return [str(found), f"{target} was not written"]
    return [str(found), *_save(model, source, target, found)]


def inspect_folder(source: str, figure: Path | None) -> list[str]:
    """Return lines that describe the model in source; if figure is given, draw s and b of its heads as PNG or SVG.

    Raises:
        UserError: source is not a model, it has no learned scale to draw, or figure does not end in
            .png or .svg.
    """
    if figure is not None:
        if figure.suffix not in (".png", ".svg"):
            raise UserError(f"the figure's name must end in .png or .svg, got {figure.name!r}")
        check_destination(figure, file=True)
    quiet()
    model = load_model(source)
    lines = _describe(model)
    if figure is None:
        return lines
    rows = _scale_rows(model, Path(source).resolve().name)
    if not rows:
        raise UserError(f"{source} has no learned number for each head, such as s; there is nothing to draw")
    from ssmax.plots.scales import scales  # loads matplotlib

    write_atomically(figure, scales(rows, figure.suffix[1:]))
    return [*lines, f"figure: {figure.resolve()}"]


def _describe(model):
    """Return lines that say which layers carry SSMax, by which law, and s and b of each head."""
    layers = _layers(model)
    width = max(5, *(len(str(key)) for key in layers))
    lines = [f"{type(model).__name__}: {len(layers)} attention layers that can carry SSMax"]
    if not hasattr(model.config, "ssmax"):
        return [*lines, "not converted: plain softmax"]
    spec = ScaleSpec.of(model.config, type(model))
    lines.append(f"{spec}, converted by ssmax {spec.version}")
    scales = [layer.module.ssmax for layer in layers.values() if hasattr(layer.module, "ssmax")]
    names = " / ".join(f"{name} of each head" for name in scales[0].learned) if scales else ""
    lines.append(f"{'layer':>{width}}  {'kind':<18} {names or 'scale'}")
    for key, layer in layers.items():
        lines.append(f"{key:>{width}}  {layer.kind:<18} {_scale_words(getattr(layer.module, 'ssmax', None))}")
    return lines


def _scale_rows(model: PreTrainedModel, name: str) -> list[Row]:
    rows = []
    for key, layer in _layers(model).items():
        scale = getattr(layer.module, "ssmax", None)
        for metric, values in ({} if scale is None else scale.learned).items():
            for head, value in enumerate(values.tolist()):
                rows.append(Row(metric, name, None, {"layer": key, "head": head}, value, 1))
    return rows


def _scale_words(scale):
    if scale is None:
        return "softmax"
    if not scale.learned:
        return f"{type(scale).__name__}({scale.extra_repr()})"
    return " / ".join(" ".join(f"{x:.4f}" for x in part.tolist()) for part in scale.learned.values())


def _layers(model: PreTrainedModel) -> dict[Any, Layer]:
    """Return the layers that carry or can carry SSMax: by index in a decoder-only language model, otherwise by name."""
    with user_errors():
        try:
            found: dict[Any, Layer] = dict(sorted(language_layers(model).items()))
        except ValueError:
            found = {**named_layers(model)}
            if not found:
                raise
        if hasattr(model.config, "ssmax"):
            keys = [key for key in ScaleSpec.of(model.config, type(model)).layers if key not in found]
            found |= {key: layers_of(model, keys)[key] for key in keys}
    return found


def _raise_theta(config: Any, factor: float) -> None:
    if factor == 1:
        return
    rope = getattr(config, "rope_parameters", None) or {}
    if not 0 < factor < math.inf:
        raise UserError(f"--theta-factor must be positive and finite, got {factor:g}")
    if rope.get("rope_type") != "default":
        raise UserError(f"--theta-factor needs RoPE of type 'default'; the model has {rope.get('rope_type') or 'none'}")
    config.rope_parameters = {**rope, "rope_theta": rope["rope_theta"] * factor}


def _tokens(source: str, config: PreTrainedConfig, texts: str | None, length: int, steps: int) -> list[Tensor]:
    """Return tokens of long texts, in a fixed shuffled order: enough pieces for the steps and for the held-out loss."""
    found, name = documents(texts, TEXT_LIMIT)
    tokenizer = load_tokenizer(source)
    check_shape(config, largest_token(tokenizer, 0), "calibrate", length, "--length")
    random.Random(0).shuffle(found)
    tokens, pieces = [], 0
    for text in found:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"]) if len(text) >= length else torch.empty(0)
        if len(ids) >= length:
            tokens.append(ids)
            pieces += len(ids) // length
        if len(tokens) > 1 and pieces >= 2 * steps:
            break
    if pieces < 2:
        raise UserError(
            f"{name} has fewer than two pieces of {length:,} tokens; give longer texts or a smaller --length"
        )
    return tokens


def _save(model: PreTrainedModel, source: str, target: Path, found: Calibration | None = None) -> list[str]:
    """Write the new folder with all files of the model; return lines that say what was written and left out."""
    try:
        with written_whole(target, owner="model", new=True) as temporary:
            model.save_pretrained(temporary)
            if found is not None:
                write_card(model, "AutoModelForCausalLM", temporary, *_measured(found))
                (temporary / "calibration.json").write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
            behind = copy_companions(source, temporary)
    except SafetensorError as error:
        if is_full(error):
            raise RunFailed(f"no space left to write {target}; nothing was kept") from error
        raise
    return [*filter(None, [behind]), f"saved as {target.resolve()}"]


def _measured(found: Calibration) -> tuple[list[tuple[str, float, float]], str]:
    """Return the loss by position of a calibration, in the form that write_card takes."""
    starts = [0, *(last + 1 for last in found.positions)]
    names = [f"{first:,} to {last:,}" for first, last in zip(starts, found.positions, strict=False)]
    rows = [*zip(names, found.before, found.after, strict=True), ("all", found.mean_before, found.mean_after)]
    return rows, f"on {found.pieces} held-out pieces of {found.length:,} tokens, before and after ssmax calibrate"
