"""Loads models from unknown sources: only from safetensors and JSON, all weights, and no file outside of the folder."""

import json
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import is_offline_mode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ssmax.errors import Damaged
from ssmax.runs.files import SEAL, check_folder
from ssmax.runs.hub import cached_only_offline, is_hub_name

# Code in the folder is never run.
SAFE: dict[str, Any] = {"trust_remote_code": False}
CAUSAL = ("ForCausalLM", "LMHeadModel")
ADAPTER = "adapter_config.json"
# Buffers that older versions of transformers saved, and that a model computes: causal masks and tables of positions.
CONSTANT = (
    ".attn.bias",
    ".attention.bias",
    ".masked_bias",
    ".causal_mask",
    "embed_positions.weights",
    "inv_freq",
    "position_ids",
)


def load_config(source: str | Path) -> PreTrainedConfig:
    """Return the config of a causal language model.

    Args:
        source: a folder, or a name on a hub.

    Raises:
        ValueError: there is no such model, or its folder is damaged, or it names files outside of
            the folder.
    """
    _check(source)
    return _told(source, lambda: AutoConfig.from_pretrained(source, **SAFE))


def load_model(source: str | Path, config: PreTrainedConfig | None = None, **options: Any) -> PreTrainedModel:
    """Load a causal language model, all of its weights or none.

    Args:
        source: a folder, or a name on a hub.
        config: a config of load_config, possibly changed. Default: the source's.
        options: options of transformers' from_pretrained.

    Raises:
        ValueError: as in load_config; or a weight is missing, or there are no safetensors.
    """
    config = load_config(source) if config is None else config
    check_causal(source, config)
    check_weights(Path(source))
    options = {"dtype": getattr(config, "dtype", None) or "auto"} | options
    model, info = _told(
        source,
        lambda: AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **SAFE,
            **options,
        ),
    )
    shapes = {name: f"{name} of shape {tuple(want)}, not {tuple(got)}" for name, got, want in info["mismatched_keys"]}
    missing = sorted({*map(str, info["missing_keys"])} - {*shapes}) + sorted(shapes.values())
    if missing:
        raise Damaged(f"{source} lacks weights that its config.json asks for: {', '.join(missing[:3])}")
    dropped = sorted(str(name) for name in info["unexpected_keys"] if not str(name).endswith(CONSTANT))
    if dropped:
        raise Damaged(
            f"{source} holds weights that do not exist in {type(model).__name__}, which its config.json names: {', '.join(dropped[:3])}; it is "
            "another kind of model, or its config.json was changed"
        )
    return model


def load_tokenizer(source: str | Path) -> Any:
    """Load a tokenizer from a folder or a hub. It raises as load_config does, and where there is none."""
    tokenizer: Any = _told(source, lambda: AutoTokenizer.from_pretrained(source, **SAFE), "tokenizer")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes an empty one without files
        raise Damaged(f"{source} has no tokenizer; save the model's own into that folder")
    return tokenizer


def _told(source, load, what="causal language model"):
    if not Path(source).exists():
        cached_only_offline()
    try:
        return load()
    except Damaged:
        raise
    # Damaged files make parsers raise many kinds of errors; tokenizers raises plain Exception.
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = reason if reason and not isinstance(error, KeyError) else f"{type(error).__name__} {reason}".strip()
        if is_offline_mode() and not Path(source).exists():
            reason = "there is no such folder, and no network to look for it on a hub"
        raise Damaged(f"{source} cannot be loaded as a {what}: {reason[:300]}") from error


def check_causal(source: str | Path, config: PreTrainedConfig) -> None:
    """Raise Damaged if a config is not that of a causal language model."""
    kind = f"{source} cannot be loaded: it is of model type {config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise Damaged(f"{kind}, an encoder-decoder model; this takes causal language models alone")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Damaged(f"{kind}, of which transformers has no causal language model")
    heads = [str(name) for name in getattr(config, "architectures", None) or ()]
    if heads and getattr(config, "is_decoder", None) is False and not any(name.endswith(CAUSAL) for name in heads):
        raise Damaged(f"{kind}, an encoder; this takes causal language models alone")


def check_weights(folder: Path) -> None:
    """Raise Damaged if a folder holds no safetensors."""
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        raise Damaged(
            f"{folder} cannot be loaded: it has no weights as safetensors"
            + (
                "; its pickles can run code and are not read: load and save the model with safetensors"
                if pickled
                else ""
            )
        )


def _check(source):
    """Raise Damaged unless source is a complete model, not an adapter, with all weight files inside the folder."""
    folder = Path(source)
    if folder.is_file():
        raise Damaged(f"{source} cannot be loaded: it is a file; give the folder of a model, or its name on a hub")
    if not folder.exists() and not is_hub_name(str(source)):
        raise Damaged(
            f"{source} cannot be loaded: there is no such folder; give the folder of a model, or its name on a hub"
        )
    if (folder / ADAPTER).exists():
        raise Damaged(
            f"{source} cannot be loaded: it is an adapter (PEFT) of {_base(folder / ADAPTER)}, not a model: load it with peft, merge it with "
            "merge_and_unload(), save that model with its tokenizer, and give its folder"
        )
    if folder.is_dir() and not (folder / "config.json").exists():
        raise Damaged(
            f"{source} cannot be loaded: it has no config.json, so it is not the folder of a model of transformers"
        )
    if (folder / SEAL).exists():
        try:
            check_folder(folder)
        except Damaged as error:
            raise Damaged(f"{error}; if you changed the folder on purpose, delete {SEAL} in it") from None
    for index in folder.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Damaged(f"{index} is damaged") from None
        for name in names:
            path = PurePosixPath(str(name))
            if path.is_absolute() or ".." in path.parts or "\\" in str(name):
                raise Damaged(f"{index} names a file outside of its folder: {name!r}")


def _base(path):
    try:
        return str(json.loads(path.read_bytes())["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError):
        return "an unknown model"


def quiet() -> None:
    """Silence transformers' own log messages and warnings, which are for programmers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
