"""Reads long texts through a model in pieces. Each way of reading is first tried on the model, so that errors are noticed."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ssmax.evaluation.chunks import CausalAfterCache
from ssmax.hf.private import implementation_of
from ssmax.hf.visibility import forward_scope
from ssmax.modules import attended

# What a model has read so far: a cache, if it continues from one exactly; otherwise the tokens, to be read again.
Memory = Cache | Tensor

# Lengths of the pieces in which a sample is read. Single tokens are among them, since some families treat them differently.
PIECES = (4, 2, 1, 3, 9, 1, 2, 5, 1, 6, 2, 1, 3, 8)
ONLY = "only causal language models of transformers can be measured and calibrated"
# The argument by which a family takes a cache of transformers.
CACHES = ("past_key_values", "cache_params")
# Caches can share layers of these kinds, which only replace their tensors and never write into them.
SHARED = (DynamicLayer, DynamicSlidingWindowLayer)


def is_transformers(model: PreTrainedModel) -> bool:
    """Return whether the model's forward is transformers' own code. Nothing is known about other code."""
    return inspect.unwrap(type(model).forward).__module__.partition(".")[0] == "transformers"


def check_reads_text(model: nn.Module) -> None:
    """Raise ValueError if a model is not a transformers model that reads tokens from left to right.

    Encoders are not recognised here, but when they read: their result for a token depends on later
    tokens.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"{name} is not a model of transformers; {ONLY}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; {ONLY}")
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(f"{name} reads {model.main_input_name}, not tokens; {ONLY}")


class Reader:
    """A model in eval mode, with the ways in which it can read a text. They are tried on the first tokens of the text.

    A cache is used only if a text in pieces gives the same states as the whole text. Some families
    ignore arguments that they do not know (Mamba does not take past_key_values), or lose a part of
    their state between two pieces (the convolutions of Mamba and Jamba). Such a model reads a text
    at once.

    Attributes:
        model: the model.
        backbone: the module whose last_hidden_state the model's own forward turns into logits. None
            if there is no such module, and for code that is not transformers' own.
    """

    def __init__(self, model: PreTrainedModel, token_ids: Tensor, chunk: int):
        """Try the model.

        Args:
            model: a causal language model of transformers, in eval mode.
            token_ids: (B, T) of the text that it will read. The first tokens of the first row are
                used for the trial.
            chunk: positions in each forward pass.

        Raises:
            ValueError: the model is not a causal language model of transformers.
        """
        check_reads_text(model)
        self.model, self.chunk = model, chunk
        self.backbone: nn.Module | None = None
        self._sample = token_ids[:1, : sum(PIECES)].to(model.device)
        with _plain_kernels(model):
            self._whole = self._find_backbone()
            half = max(1, self._sample.shape[1] // 2)
            self._check_causal(self._states(self._sample[:, :half], self.fresh_if_needed()), self._whole[:, :half])

    @cached_property
    def pieces(self) -> bool:
        """Whether a text in pieces, read one after another into a cache, gives the states of the whole text."""
        sizes = [min(size, self.chunk) for size in PIECES for _ in range(-(-size // min(size, self.chunk)))]
        return self._continues(sizes)

    @cached_property
    def steps(self) -> bool:
        """Whether a text that is read at once and then continued token by token gives the states of the whole text."""
        return self.pieces or self._continues([max(1, self._sample.shape[1] - 3), *[1] * sum(PIECES)])

    @cached_property
    def _names(self) -> list[str]:
        """Names of the arguments by which a cache may be given; the one in use is first."""
        named = [name for name in CACHES if name in self._arguments]
        return named or ([] if is_transformers(self.model) or "kwargs" not in self._arguments else list(CACHES[:1]))

    @cached_property
    def _arguments(self) -> set[str]:
        """Names of the forward's arguments, "kwargs" for any others."""
        parameters = inspect.signature((self.backbone or self.model).forward).parameters.values()
        return {"kwargs" if x.kind is x.VAR_KEYWORD else x.name for x in parameters}

    def _continues(self, sizes):
        parts = self._sample.split(_cut(sizes, self._sample.shape[1]), 1)
        if len(parts) == 1:
            return False
        for name in list(self._names):
            self._names[:] = [name, *(other for other in self._names if other != name)]
            cache = self.fresh_cache()
            try:
                with _plain_kernels(self.model):
                    states = torch.cat([self._states(part, cache) for part in parts], 1)
            except Exception:  # families without such a cache raise various errors; they read whole texts
                continue
            first = parts[0].shape[1]
            if relative_error(states[:, first:], self._whole[:, first:]) < tolerance(states.dtype):
                return True
        return False

    def _find_backbone(self):
        """Find the backbone; return the sample's states, or its logits if there is no backbone."""
        if not is_transformers(self.model):
            return self._states(self._sample, self.fresh_if_needed())
        with _outermost(self.model) as calls:
            logits = self._logits(self.model(input_ids=self._sample, use_cache=False))
        found = [(module, output) for module, output in calls if getattr(output, "last_hidden_state", None) is not None]
        if len(found) != 1 or not isinstance(found[0][1].last_hidden_state, Tensor):
            return logits
        self.backbone, output = found[0]
        try:
            again = self.logits(output, output.last_hidden_state)
        except Exception:  # the head needs more than the backbone's states
            again = None
        if again is None or again.shape != logits.shape or relative_error(again, logits) > tolerance(logits.dtype):
            self.backbone = None
            return logits
        return output.last_hidden_state

    def _check_causal(self, alone, within):
        # Three times the tolerance: a false alarm refuses a model here, and only costs time elsewhere.
        if relative_error(alone, within) > 3 * tolerance(alone.dtype):
            raise ValueError(
                f"{type(self.model).__name__} is not causal: its result for a token depends on later tokens, so its loss and "
                "answers would use tokens that it has to predict (a BERT needs is_decoder=True in its config)"
            )

    def fresh_cache(self) -> Cache:
        """Return an empty cache."""
        return DynamicCache(config=self.model.config)

    def fresh_if_needed(self) -> Cache | None:
        """Return the cache for a text that is read at once: None, or an empty one for code that may rely on it."""
        return None if is_transformers(self.model) or not self._names else self.fresh_cache()

    def _states(self, token_ids, cache):
        output = self.run(token_ids, cache)
        return self._logits(output) if self.backbone is None else output.last_hidden_state

    def _logits(self, output):
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise ValueError(f"{type(self.model).__name__} does not return logits for each token; {ONLY}")
        return logits

    def run(self, token_ids: Tensor, cache: Cache | None = None) -> Any:
        """Run tokens (B, T) after the cache, if there is one; return the output of the backbone, or of the model."""
        if self.backbone is None:
            return self.call(token_ids, cache)
        with forward_scope(), CausalAfterCache():
            return self.backbone(input_ids=token_ids, **self._given(cache))

    def call(self, token_ids: Tensor, cache: Cache | None = None, **options: Any) -> Any:
        """Run the whole model, with its head. Options that its forward does not name are left out."""
        named = inspect.signature(self.model.forward).parameters
        options = {
            name: value
            for name, value in options.items()
            if name in named or (name == "output_attentions" and is_transformers(self.model))
        }
        with forward_scope():
            return self.model(input_ids=token_ids, **self._given(cache), **options)

    def _given(self, cache):
        given: dict[str, Any] = {} if cache is None else {self._names[0]: cache}
        return given | ({"use_cache": cache is not None} if {"use_cache", "kwargs"} & self._arguments else {})

    def logits(self, output: Any, states_BTD: Tensor) -> Tensor:
        """Return the logits of states (B, T, D) of the backbone's output, computed by the rest of the model."""
        with _answering(self.backbone, output, states_BTD):
            return self.model(input_ids=self._sample[:, :1], use_cache=False).logits

    def empty(self, rows: int) -> Memory:
        """Return the Memory of a model that has read nothing."""
        return self.fresh_cache() if self.pieces else self._sample.new_zeros(rows, 0)

    def read(self, memory: Memory, token_ids: Tensor, progress: Callable[[int], Any] = lambda _: None) -> Memory:
        """Return the Memory after (B, T) further tokens; T may be 0."""
        if isinstance(memory, Tensor):
            progress(token_ids.numel())
            return torch.cat([memory, token_ids], 1)
        for rows in token_ids.split(self.chunk, 1) if token_ids.shape[1] else ():
            self._feed(rows, memory)
            progress(rows.numel())
        return memory

    def _feed(self, rows, cache):
        self.run(rows, cache) if self.backbone is not None else self.call(rows, cache, logits_to_keep=1)

    def prefilled(self, token_ids: Tensor) -> Cache:
        """Read a text at once, and return the cache that holds it."""
        cache = self.fresh_cache()
        self._feed(token_ids, cache)
        return cache


def branch(memory: Memory) -> Memory:
    """Return a copy of a Memory that can be extended without changing the original."""
    if isinstance(memory, Tensor):
        return memory
    grown = copy.copy(memory)
    grown.layers = [copy.copy(x) if type(x) in SHARED else copy.deepcopy(x) for x in memory.layers]
    return grown


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error up to which two results count as equal: far above rounding, far below a lost state.

    It is at least that of float32, since some families compute some steps in float32 for any dtype.
    """
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.6


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the mean over positions of the relative error: few positions whose experts differ by rounding count little."""
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    gap = torch.where(same, 0.0, got - want).norm(dim=-1)
    return (gap / want.nan_to_num(0.0, 0.0, 0.0).norm(dim=-1).clamp(min=1e-30)).mean().item()


def _cut(sizes, total):
    kept = []
    for size in sizes:
        kept.append(min(size, total - sum(kept)))
        if sum(kept) == total:
            break
    return kept


@contextmanager
def _plain_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, use eager attention instead of FlexAttention, which would compile for each length of a sample."""
    if implementation_of(model.config) != "flex_attention":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("flex_attention")


@contextmanager
def _outermost(model: nn.Module) -> Iterator[list[tuple[nn.Module, Any]]]:
    """Yield a list that receives each module that the model's own forward calls, with its output."""
    calls: list[tuple[nn.Module, Any]] = []
    depth = 0

    def enter(module, inputs):
        nonlocal depth
        depth += 1

    def leave(module, inputs, output):
        nonlocal depth
        depth -= 1
        if depth == 0:
            calls.append((module, output))

    handles = []
    for module in model.modules():
        if module is not model:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _answering(backbone: Any, output: Any, states: Tensor) -> Iterator[None]:
    """Inside the block, the backbone returns the given states, so that the rest of the model can run slice by slice."""
    answer = copy.copy(output)
    answer.last_hidden_state = states
    before = vars(backbone).get("forward")

    def answered(*args, **kwargs):
        attended.note(backbone)  # its attention ran when the states were made
        return answer

    backbone.forward = answered
    try:
        yield
    finally:
        if before is None:
            del backbone.forward
        else:
            backbone.forward = before


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode inside the block, and restore its mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
