"""Loading a model's folder that came from anywhere: safetensors and JSON alone, all of it, and nothing outside of it."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ssmax.errors import Damaged
from ssmax.files import SEAL, check_folder

__all__ = ["load_config", "load_model", "load_tokenizer"]

# No pickle, which runs code when it is loaded, and no code of the folder's own.
SAFE: dict[str, Any] = {"trust_remote_code": False}


def load_config(source: str | Path) -> PreTrainedConfig:
    """Return the config of a causal language model.

    Args:
        source: a folder, or a name on a hub.

    Raises:
        ValueError: there is no such model, or its folder is damaged or names files outside of it.
    """
    _check(Path(source))
    return _told(source, lambda: AutoConfig.from_pretrained(source, **SAFE))


def load_model(source: str | Path, config: PreTrainedConfig | None = None, **options: Any) -> PreTrainedModel:
    """Load a causal language model, all of its weights or none.

    Args:
        source: a folder, or a name on a hub.
        config: as load_config gave it, or changed; default the source's.
        options: of transformers' from_pretrained.

    Raises:
        ValueError: as load_config; or a weight is missing, or there are no safetensors.
    """
    config = load_config(source) if config is None else config
    options = {"dtype": getattr(config, "dtype", None) or "auto"} | options
    model, info = _told(
        source,
        lambda: AutoModelForCausalLM.from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True, **SAFE, **options
        ),
    )
    missing = sorted(map(str, info["missing_keys"])) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise Damaged(f"{source} lacks weights that its config.json asks for: {', '.join(missing[:3])}")
    return model


def load_tokenizer(source: str | Path) -> Any:
    """Load a tokenizer; errors as load_config."""
    return _told(source, lambda: AutoTokenizer.from_pretrained(source, **SAFE), "tokenizer")


def _told(source, load, what="causal language model"):
    try:
        return load()
    except Damaged:
        raise
    # Whatever a damaged file makes a parser raise; tokenizers raises Exception itself.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Damaged(f"{source} cannot be loaded as a {what}: {reason[:300]}") from error


def _check(folder):
    """Where it was sealed, all must be as it was; weight files must lie in the folder."""
    if (folder / SEAL).exists():
        check_folder(folder)
    for index in folder.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Damaged(f"{index} is damaged") from None
        for name in names:
            path = PurePosixPath(str(name))
            if path.is_absolute() or ".." in path.parts or "\\" in str(name):
                raise Damaged(f"{index} names a file outside of its folder: {name!r}")
