"""A converted model as an ONNX graph, by transformers' own exporter: the multipliers become part of the graph, with n from its mask."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from ssmax.errors import RunFailed, UserError
from ssmax.hf.companions import copy_companions
from ssmax.hf.loading import load_model
from ssmax.runs.files import written_whole
from ssmax.versions import INSTALL

__all__ = ["export_onnx", "sample_inputs"]


def export_onnx(source: str, target: Path, *, dry_run: bool = False) -> list[str]:
    """Write the model in the folder source as the new folder target: model.onnx, its weights and config, the tokenizer.

    The graph computes in float32, for any batch size and length. It takes a KV cache where all layers attend in full; a window's
    cache forgets keys, which a graph cannot, so that such models take whole sequences each time.

    Args:
        source: folder of a model and its tokenizer. A softmax model is written as such.
        target: new folder.
        dry_run: load the model, write nothing.

    Raises:
        UserError: target exists, the packages or transformers' exporter are missing, or source holds no model.
        RunFailed: the exporter does not take this model.
    """
    if target.exists():
        raise UserError(f"{target} exists already; give a new folder")
    logging.disable_progress_bar()
    try:
        model = load_model(source, dtype=torch.float32).eval()
    except ValueError as error:
        raise UserError(str(error)) from error
    inputs = sample_inputs(model)
    cached = (
        "with a KV cache" if "past_key_values" in inputs else "without a KV cache (a layer has a cache of its own kind)"
    )
    done = f"{type(model).__name__} in float32, {cached}"
    if dry_run:
        return [done, "dry run: nothing was written"]
    exporter = _exporter()
    try:
        exported = _export(exporter, model, inputs)
    except Exception as error:  # of torch.export, torch.onnx or onnxscript, which raise what they like
        reason = str(error).strip().splitlines() or [""]
        raise RunFailed(
            f"transformers' exporter does not take this model ({type(error).__name__}: {reason[0]})"
        ) from error
    with written_whole(target) as temporary:
        exported.save_pretrained(temporary)
        copy_companions(source, temporary)
    graph = exported.program.graph
    names = [", ".join(str(value.name) for value in values) for values in (graph.inputs, graph.outputs)]
    return [done, f"inputs: {names[0]}", f"outputs: {names[1]}", f"saved as {target.resolve()}"]


def sample_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Return inputs of a step after a cache, or of whole sequences where a layer's cache is not one that only grows.

    No size is 1 or equal to another, since an exporter may take such sizes for fixed or for the same.
    """
    tokens = torch.arange(10).view(2, 5) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        cache = model(tokens).past_key_values
    grows = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    past = 5 if grows else 0
    inputs = {
        "input_ids": tokens[:, :3],
        "attention_mask": torch.ones(2, past + 3, dtype=torch.long),
        "position_ids": torch.arange(past, past + 3).expand(2, 3).contiguous(),
    }
    return {**inputs, "past_key_values": cache} if grows else {**inputs, "use_cache": False}


def _exporter() -> Any:
    try:
        for package in ("onnx", "onnxscript"):
            importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"the package {error.name!r} is missing; {INSTALL.replace('NAME', 'export')} brings it"
        ) from error
    try:
        return importlib.import_module("transformers.exporters.exporter_onnx")
    except ImportError as error:
        raise UserError(f"this version of transformers has no ONNX exporter ({error}); 5.23 has one") from error


def _export(exporter, model, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return exporter.OnnxExporter().export(model, inputs, config=exporter.OnnxConfig(dynamic=True))
