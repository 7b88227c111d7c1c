"""Prompts that share a prefix, prefilled once: contexts of a needle grid, questions about one context."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ssmax.evaluation.chunks import backbone_states, has_backbone

__all__ = ["Node", "feed", "prefill", "prefix_tree", "size"]


@dataclass(frozen=True)
class Node:
    """A stretch of tokens that some prompts share.

    Attributes:
        prompt: one of the prompts that hold it.
        start: its first position.
        stop: its last position + 1.
        ends: the prompts that end here.
        children: the stretches that follow, the one with most tokens last.
    """

    prompt: int
    start: int
    stop: int
    ends: tuple[int, ...]
    children: tuple["Node", ...]


def prefix_tree(prompts: Sequence[Tensor]) -> Node:
    """Return the tree of shared prefixes.

    Args:
        prompts: (B, T_i) token ids each; two prompts share a position where all B rows do.
    """
    return _node([prompt.cpu() for prompt in prompts], list(range(len(prompts))), 0)


def _node(prompts, members, start):
    shortest = min(prompts[i].shape[1] for i in members)
    head = prompts[members[0]][:, start:shortest]
    differs = torch.zeros(head.shape[1], dtype=torch.bool)
    for i in members[1:]:
        differs |= (prompts[i][:, start:shortest] != head).any(0)
    stop = start + int(differs.int().argmax()) if differs.any() else shortest
    ends = [i for i in members if prompts[i].shape[1] == stop]
    groups: dict[tuple, list[int]] = {}
    for i in members:
        if i not in ends:
            groups.setdefault(tuple(prompts[i][:, stop].tolist()), []).append(i)
    children = sorted((_node(prompts, group, stop) for group in groups.values()), key=size)
    return Node(members[0], start, stop, tuple(ends), tuple(children))


def size(node: Node) -> int:
    """Return the tokens of a tree, which is what its prefill costs for each row of a batch."""
    return node.stop - node.start + sum(map(size, node.children))


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    tree: Node,
    *,
    chunk: int,
    progress: Callable[[int], Any] | None = None,
) -> Iterator[tuple[int, Cache]]:
    """Yield each prompt's index and a cache that holds it, in the order of the tree; the caller may extend the cache.

    Memory: a few caches of the longest prompt, one for each branching above the present prompt.
    """
    yield from _walk(model, prompts, tree, DynamicCache(config=model.config), chunk, progress or (lambda tokens: None))


def _walk(model, prompts, node, cache, chunk, progress):
    feed(model, prompts[node.prompt][:, node.start : node.stop], cache, chunk, progress)
    for i in node.ends:
        yield i, _branch(cache)
    for child in node.children[:-1]:
        yield from _walk(model, prompts, child, _branch(cache), chunk, progress)
    if node.children:
        yield from _walk(model, prompts, node.children[-1], cache, chunk, progress)


def feed(
    model: PreTrainedModel, token_ids: Tensor, cache: Cache, chunk: int, progress: Callable[[int], Any] = lambda _: None
) -> None:
    """Append (B, T) tokens to the cache in chunks; T may be 0."""
    if not token_ids.shape[1]:
        return
    append = backbone_states if has_backbone(model) else _whole
    for rows in token_ids.split(chunk, 1):
        append(model, rows, cache)
        progress(rows.numel())


def _whole(model, token_ids, cache):
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    model(input_ids=token_ids, past_key_values=cache, use_cache=True, **({"logits_to_keep": 1} if keeps else {}))


def _branch(cache: Cache) -> Cache:
    """A cache that grows apart from this one; layers that only ever replace their tensors share them until then."""
    branch = copy.copy(cache)
    shared = (DynamicLayer, DynamicSlidingWindowLayer)
    branch.layers = [copy.copy(x) if type(x) in shared else copy.deepcopy(x) for x in cache.layers]
    return branch
