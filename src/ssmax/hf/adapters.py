"""PEFT's adapters of converted models: their files also hold s and b, and are loaded only into a model with these scales."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import logging

from ssmax.hf.refusals import wrap

logger = logging.get_logger(__name__)

# Names that PEFT puts after the name of a module that it wrapped.
WRAPPED = (".original_module", ".base_layer")


def install() -> None:
    """Wrap PEFT's reading and writing of adapters, once, if PEFT is installed."""
    try:
        import peft
    except ImportError:  # not installed, or not with these versions, so that nobody can use it
        return
    for name, around in (("get_peft_model_state_dict", _written), ("set_peft_model_state_dict", _read)):
        original = getattr(peft, name)
        for module in [module for key, module in sys.modules.items() if key.partition(".")[0] == "peft"]:
            if vars(module).get(name) is original:
                wrap(module, name, around)
    wrap(PeftAdapterMixin, "load_adapter", _refuse_lost)


def _refuse_lost(original, self, *args, **kwargs):
    """Refuse an adapter whose scales transformers would drop, since its load_adapter ignores names that it does not know."""
    before = set(getattr(self, "peft_config", ()))
    found = original(self, *args, **kwargs)
    lost = [name for name in getattr(found, "unexpected_keys", ()) if _scale_of(name)]
    if lost:
        self.delete_adapter(list(set(self.peft_config) - before))
        raise ValueError(
            f"the adapter holds SSMax scales that the model does not have ({_shown(lost)}): it would compute something else. "
            "Convert the base model first, as it was when the adapter was trained"
        )
    return found


def _written(original, model, state_dict=None, *args, **kwargs):
    """Return the content of an adapter's file: PEFT's own tensors, and the scales that are not among them."""
    found = original(model, state_dict, *args, **kwargs)
    held = {_scale_of(name) for name in found}
    for name, value in _scales(model, state_dict).items():
        if _scale_of(name) not in held:
            found[name] = value
    return found


def _read(original, model, peft_model_state_dict, adapter_name="default", *args, **kwargs):
    """Load an adapter into a model, or raise ValueError if its scales do not fit those of the model."""
    mine, places = _scales(model), {_scale_of(name) for name in _scales(model)}
    held = {_scale_of(name) for name in peft_model_state_dict} - {""}
    given = _scales(model, peft_model_state_dict)
    if (held and held != places) or (given and set(given) != set(mine)):
        raise ValueError(
            f"the adapter holds SSMax scales ({_shown(given or held)}), and the model {'others' if mine else 'none'} "
            f"({_shown(mine)}): it would compute something else. Convert the base model first, as it was when the adapter was trained"
        )
    if mine and not held:
        logger.warning("the adapter holds no SSMax scales; those of the model stay as they are")
    own = any(f".ssmax.modules_to_save.{adapter_name}." in name for name, _ in model.named_parameters())
    others = len(getattr(model, "peft_config", ())) > 1
    if others and not own and any(not torch.equal(mine[name].cpu(), value.cpu()) for name, value in given.items()):
        raise ValueError(
            "the adapter was trained with other SSMax scales than the model's, and the model has a second adapter, which they would change; "
            'name "ssmax" in modules_to_save, so that each adapter has its own'
        )
    return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)


def _scales(model: nn.Module, state_dict: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Return s and b of a model by their names without PEFT's wrappers, except those that belong to one adapter."""
    found = {}
    for name, value in (model.state_dict() if state_dict is None else state_dict).items():
        place, _, part = name.rpartition(".")
        for wrapper in WRAPPED:
            place = place.removesuffix(wrapper)
        if place.endswith(".ssmax"):
            found[f"{place}.{part}"] = value
    return found


def _scale_of(name: str) -> str:
    """Return the name of the module whose scale a tensor belongs to, or an empty string."""
    place, found, _ = name.partition(".ssmax.")
    return place if found else ""


def _shown(names):
    some = sorted(names)
    return ", ".join(some[:3]) + (" ..." if len(some) > 3 else "")
