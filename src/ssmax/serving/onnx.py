"""Export of a converted model to ONNX, by transformers' own exporter. The graph computes the law, with n from its mask."""

import contextlib
import importlib
import inspect
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ssmax.errors import RunFailed, UserError
from ssmax.hf.companions import copy_companions
from ssmax.hf.conversion import revert
from ssmax.hf.loading import load_model, quiet
from ssmax.hf.portable.card import write_onnx_card
from ssmax.hf.refusals import carries_scales
from ssmax.runs.failures import user_errors
from ssmax.runs.files import check_destination, written_whole
from ssmax.versions import INSTALL


def export_onnx(source: str, target: Path, *, dry_run: bool = False) -> list[str]:
    """Write a model to a new folder: model.onnx, its weights, the config, the tokenizer and a card.

    The config is that of the softmax model, since the graph and not a class of transformers computes
    SSMax. The graph computes in float32, for any batch size and length. It takes a KV cache if all layers
    attend in full. The exporter cannot express the cache of a layer with a window, which drops keys;
    such models take the whole sequence at each step.

    Args:
        source: folder of a model and its tokenizer. A softmax model is written as a softmax model.
        target: new folder.
        dry_run: load the model and the exporter, and write nothing.

    Returns:
        Lines that say what was done, with the names of the graph's inputs and outputs.

    Raises:
        UserError: target exists, a package or transformers' exporter is missing, or source holds no
            model.
        RunFailed: the exporter does not take this model.
    """
    check_destination(target, new=True)
    quiet()
    with user_errors():
        model = load_model(source, dtype=torch.float32).eval()
    sample = sample_inputs(model)
    cached = (
        "with a KV cache"
        if "past_key_values" in sample
        else "without a KV cache (the cache of a layer drops keys, or there is none)"
    )
    done = f"{type(model).__name__} in float32, {cached}"
    exporter = _exporter()
    if dry_run:
        return [done, "dry run: nothing was written"]
    try:
        exported = _export(exporter, model, sample)
    except Exception as error:  # torch.export, torch.onnx and onnxscript raise many kinds of errors
        reason = str(error).strip().splitlines() or [""]
        raise RunFailed(
            f"transformers' exporter does not take this model ({type(error).__name__}: {reason[0]})"
        ) from error
    graph = exported.program.graph
    inputs, outputs = (", ".join(str(value.name) for value in values) for values in (graph.inputs, graph.outputs))
    with written_whole(target, new=True) as temporary:
        exported.save_pretrained(temporary)
        if carries_scales(type(model)):
            write_onnx_card(model, temporary, inputs, outputs)
            revert(model)  # its classes, and the code file that config.json names, are not in the new folder
            model.config.save_pretrained(temporary)
        behind = copy_companions(source, temporary)
    lines = [done, f"inputs: {inputs}", f"outputs: {outputs}", behind, f"saved as {target.resolve()}"]
    return [line for line in lines if line is not None]


def sample_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Return example inputs for the exporter: a step after a cache, or whole sequences if there is no cache that only grows.

    All sizes differ and exceed 1: an exporter may treat a size of 1 as a constant, and equal sizes as
    one.
    """
    tokens = torch.arange(10).view(2, 5) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        cache = getattr(model(tokens), "past_key_values", None)
    grows = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    past = 5 if grows else 0
    inputs = {
        "input_ids": tokens[:, :3],
        "attention_mask": torch.ones(2, past + 3, dtype=torch.long),
        "position_ids": torch.arange(past, past + 3).expand(2, 3).contiguous(),
    }
    inputs |= {"past_key_values": cache} if grows else {"use_cache": False}
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in taken}


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
        raise UserError(
            f"this version of transformers has no ONNX exporter ({error}); install 5.23 or newer"
        ) from error


def _export(exporter, model, sample):
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # torch prints each of its steps
            warnings.simplefilter("ignore")
            return exporter.OnnxExporter().export(model, sample, config=exporter.OnnxConfig(dynamic=True))
    finally:
        logging.disable(logging.NOTSET)
