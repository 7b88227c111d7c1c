"""SharpCache: a cache with which a converted model decodes sharply, reading only the keys and values that can matter."""

import warnings
from typing import Any

import numpy as np
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ssmax.hf import private
from ssmax.hf.checkpoint import SSMaxModel
from ssmax.hf.dispatch import SCREENS
from ssmax.hf.layers import FULL, language_layers
from ssmax.sharp import decode
from ssmax.sharp.keys import Grown, ScreenedKeys

TRIAL = 256  # steps after which a layer that gains nothing turns plain
MOST_READ = (
    1 / 2
)  # a layer of 4 heads that read 0.53 of 32,768 keys took longer than plain decoding; see docs/numbers.md


class SharpCache(DynamicCache):
    """A cache for generate that lets a converted model decode sharply. CPU, inference only.

    Prefill is exact. After 4,096 keys or more, a decode step of a converted layer with full
    attention reads only the keys that can matter. Each component of its attention is then wrong by
    at most 2 tolerance max|v|, certified. Flat heads, shorter caches and other layers are computed
    in full. The cache grows in place: a step copies no old key. Cropping works (assisted and
    prompt-lookup decoding), and batches may be padded.

    If the heads of a layer together read more than half of their keys for 256 such steps, that
    layer decodes in full from then on, without a screen, and the cache warns once. So a model that
    gains nothing pays nothing.

    Args:
        model: a converted model on the CPU, with attn_implementation "sdpa". It is not changed.
        tolerance: weight that may be left out of a row, in (0, 1); see ssmax.attention.

    Raises:
        ValueError: the model is not converted, not on sdpa or not on the CPU; tolerance is outside
            (0, 1); later also for beam search and other reordering of the batch.

    Example:
        >>> model.generate(tokens, past_key_values=ssmax.hf.SharpCache(model))
    """

    def __init__(self, model: Any, tolerance: float = 1e-3):
        if not isinstance(model, SSMaxModel):
            raise ValueError(f"SharpCache needs a converted model, got {type(model).__name__}; see ssmax.convert")
        implementation = private.implementation_of(model.config)
        if implementation != "sdpa":
            raise ValueError(
                f"SharpCache serves attention implementation 'sdpa', got {implementation!r}; use "
                "model.set_attn_implementation('sdpa')"
            )
        if model.device.type != "cpu":
            raise ValueError(f"sharp decoding runs on the CPU, and the model is on {model.device}; leave the cache out")
        decode.check_tolerance(tolerance)
        super().__init__(config=model.config)
        self._said = False
        for index, layer in language_layers(model).items():
            if layer.kind == FULL and hasattr(layer.module, "ssmax") and type(self.layers[index]) is DynamicLayer:
                self.layers[index] = _SharpLayer(tolerance)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not self._said and getattr(self.layers[layer_idx], "sharp", None) is not None:
            self._say()
        return updated

    def share_read(self) -> dict[int, np.ndarray]:
        """Return by layer the share of keys that each key head read exactly, (batch, key heads), mean over the steps so far.

        1 is plain decoding. Layers that never decode sharply are missing. Layers that have turned
        plain keep their last share.
        """
        return {
            index: layer.screened.share_read()
            for index, layer in enumerate(self.layers)
            if isinstance(layer, _SharpLayer) and layer.is_initialized
        }

    def _say(self):
        """Warn once: when it is decided for all layers whether they stay sharp, and some do not."""
        served = {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, _SharpLayer)}
        if any(layer.sharp is None for layer in served.values()):
            return
        self._said = True
        sharp = [index for index, layer in served.items() if layer.sharp]
        if len(sharp) < len(served):
            names = f" ({', '.join(map(str, sharp))})" if sharp else ""
            warnings.warn(
                f"{len(sharp)} of {len(served)} layers are sharp{names}; the others read most of their keys and "
                "are decoded plainly from now on",
                stacklevel=2,
            )


class _SharpLayer(DynamicLayer):
    """A layer's keys, with their screen, and values, in buffers that grow. The dispatch finds the screen of the keys that it returns."""

    def __init__(self, tolerance: float):
        super().__init__()
        self.tolerance = tolerance
        self.sharp: bool | None = None  # whether this layer decodes sharply; None until it is decided

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.screened = ScreenedKeys(key_states[:, :, :0])
            self.grown = Grown(value_states[:, :, :0])
            self.sharp = None
        if self.sharp is None and self.screened.steps >= TRIAL:
            self.sharp = bool(self.screened.share_read().mean() <= MOST_READ)
            if not self.sharp:
                self.screened.give_up()
        self.screened.append(key_states)
        self.grown.put(value_states.detach(), self.grown.length)
        return self._show()

    def _show(self):
        self.keys, self.values = self.screened.keys, self.grown.filled
        SCREENS[self.keys] = (None if self.sharp is False else self.screened, self.tolerance)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negative number of tokens to remove, got {tokens_to_remove}")
        if self.is_initialized:
            self.grown.length = max(0, self.grown.length + tokens_to_remove)
            self.screened.crop(self.grown.length)
            self._show()

    def reorder_cache(self, beam_idx: Any) -> None:
        raise ValueError(
            "SharpCache cannot reorder, repeat or select sequences, as beam search does; decode greedily or sample, or "
            "leave past_key_values out"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)
