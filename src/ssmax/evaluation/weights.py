"""The attention weights of one query in every layer, by the layer's index, or the reason why they are not available."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from ssmax.evaluation.reading import is_transformers
from ssmax.hf import private

WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding")


class Weights:
    """The attention weights of one query.

    Attributes:
        layers: (B, heads, keys up to the query) by layer index; a layer with a window holds only
            its last keys.
        without: layers that ran and have no attention weights.
        problem: the reason why weights of a layer with attention are not available, or None.
    """

    def __init__(self, model: PreTrainedModel, row: int, length: int):
        """Record the query at index row of the tokens in a forward; it sees length tokens."""
        self.model, self.row, self.length = model, row, length
        self.layers: dict[int, Tensor] = {}
        self.without: list[int] = []
        self.problem: str | None = None
        self._ran: list[tuple[str, int]] = []  # the list of layers, and the number in it
        self._found: list[
            tuple[tuple[str, int], Any, Tensor]
        ] = []  # the layer that was running, its module, its weights

    def enter(self, where: tuple[str, int], module: Any, inputs: Any) -> None:
        """Hook of a layer, which is a number in a list of layers: note that it begins to run."""
        self._ran.append(where)

    def keep(self, module: Any, weights: Any) -> None:
        """Keep the weights that an attention function of transformers returned."""
        if isinstance(weights, Tensor) and weights.ndim == 4 and self._ran:
            self._found.append((self._ran[-1], module, weights[:, :, self.row].float()))

    def add(self, output: Any) -> None:
        """Assign the recorded weights, and those that the model returned itself, to the layers' indices."""
        stacks = {stack for (stack, _), _, _ in self._found}
        indices = [layer for (_, layer), _, _ in self._found]
        if len(set(indices)) < len(indices):
            own = [getattr(module, "layer_idx", -1) for _, module, _ in self._found]
            if len(set(own)) < len(own) or -1 in own:
                twice = sorted({i for i in indices if indices.count(i) > 1})
                self.problem = (
                    f"layers {_said(twice)} attend several times in one pass; which weights are whose is unknown"
                )
                return
            indices = [int(layer) for layer in own]
        found = {i: (module, weights) for i, (_, module, weights) in zip(indices, self._found, strict=True)}
        returned = list(getattr(output, "attentions", None) or ())
        # Other lists of modules may be numbered too. The layers are the list that attends, or one with as many as were returned.
        if not stacks:
            stacks = {stack for stack, _ in self._ran if len({i for s, i in self._ran if s == stack}) == len(returned)}
        ran = sorted({layer for stack, layer in self._ran if stack in stacks} | set(found))
        if len(returned) == len(ran):
            for layer, weights in zip(ran, returned, strict=True):
                if layer not in found and _is_square(weights, self.row, self.length):
                    found[layer] = None, weights[:, :, self.row].float()
        elif len(returned) > len(found):
            self.problem = (
                f"it returns {len(returned)} attention weights of {len(ran)} layers; which are whose is unknown"
            )
            return
        self.without = [layer for layer in ran if layer not in found]
        for layer, (module, weights) in sorted(found.items()):
            self._take(layer, module, weights)
        if self.problem is not None:
            self.refuse(self.problem)
        elif not found and any("Attention" in type(module).__name__ for module in self.model.modules()):
            self.problem = f"{type(self.model).__name__} returns no attention weights"

    def _take(self, layer, module, weights):
        if weights.isnan().any():
            raise FloatingPointError(f"the attention weights of layer {layer} are not numbers (nan)")
        keys = weights.shape[-1]
        if keys > self.length or (keys < self.length and not self._is_windowed(layer, module)):
            self.problem = f"layer {layer} attends to {keys} keys after {self.length} tokens: its keys are not tokens"
        elif (weights < 0).any() or (weights.sum(-1) > 1.01).any():
            self.problem = (
                f"the attention weights of layer {layer} are not a softmax: they are negative, or sum to more than 1"
            )
        else:
            self.layers[layer] = weights

    def refuse(self, problem: str) -> None:
        """Drop all weights, with the reason."""
        self.problem, self.layers = problem, {}

    def _is_windowed(self, layer, module):
        config = self.model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or []
        if layer < len(kinds):
            return kinds[layer] in WINDOWED
        return bool(getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None))

    def raise_problem(self) -> None:
        """Raise ValueError if the model has attention and its weights are not available."""
        if self.problem or not self.layers:
            raise ValueError(
                f"attention cannot be measured: {self.problem or f'{type(self.model).__name__} has no attention weights'}"
            )

    def warn_of_missing(self) -> None:
        """Warn of layers that have no attention weights."""
        if self.without:
            warnings.warn(
                f"attention is that of layers {_said(sorted(self.layers))}; layers {_said(self.without)} have no attention "
                "weights",
                stacklevel=3,
            )


@contextmanager
def recorded(model: PreTrainedModel, row: int, length: int) -> Iterator[Weights]:
    """Inside the block, run the model on eager attention and record the weights of one query.

    Args:
        model: the model.
        row: the query's index among the tokens of the forward.
        length: number of tokens that it sees.
    """
    weights = Weights(model, row, length)
    handles = [
        module.register_forward_pre_hook(functools.partial(weights.enter, where)) for where, module in _numbered(model)
    ]
    before, interface = private.implementation_of(model.config), AttentionInterface.get_interface

    def get_interface(self, attn_implementation, default):
        kernel = interface(self, attn_implementation, default)

        def kept(module, *args, **kwargs):
            result = kernel(module, *args, **kwargs)
            weights.keep(module, result[1])
            return result

        return kept

    AttentionInterface.get_interface = get_interface
    _choose(model, "eager")
    try:
        yield weights
    finally:
        AttentionInterface.get_interface = interface
        _choose(model, before)
        for handle in handles:
            handle.remove()


def _choose(model, implementation):
    if is_transformers(model):
        model.set_attn_implementation(implementation)
    else:  # set_attn_implementation does nothing for such a class, but its layers read the config
        private.set_implementation(model.config, implementation)


def _numbered(model: nn.Module) -> list[tuple[tuple[str, int], nn.Module]]:
    """Return the layers with their list and number: modules whose name is a number, and that lie in no other such module."""
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        *above, last = name.split(".")
        if last.isdigit() and not any(part.isdigit() for part in above):
            found.append(((".".join(above), int(last)), module))
    return found


def _is_square(weights, row, length):
    return isinstance(weights, Tensor) and weights.ndim == 4 and row < weights.shape[2] and length <= weights.shape[3]


def _said(layers):
    return ", ".join(map(str, layers))
