"""Reads the shared prefixes of prompts once, such as contexts of a needle grid and questions about one context."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmax.evaluation.reading import Memory, Reader, branch


@dataclass(frozen=True)
class Node:
    """A part of the tree of prefixes: tokens that some prompts share.

    Attributes:
        prompt: index of one of these prompts.
        start: its first position.
        stop: its last position + 1.
        ends: indices of the prompts that end here.
        children: the parts that follow; the one with the most tokens is last.
    """

    prompt: int
    start: int
    stop: int
    ends: tuple[int, ...]
    children: tuple["Node", ...]


def prefix_tree(prompts: Sequence[Tensor]) -> Node:
    """Return the tree of shared prefixes.

    Args:
        prompts: (B, T_i) token ids each. Two prompts share a position if all B rows do.
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
    """Return the number of tokens of a tree: the cost of its prefill for each row of a batch."""
    return node.stop - node.start + sum(map(size, node.children))


@torch.inference_mode()
def prefill(
    reader: Reader,
    prompts: Sequence[Tensor],
    node: Node,
    progress: Callable[[int], Any] | None = None,
    memory: Memory | None = None,
) -> Iterator[tuple[int, Memory]]:
    """Yield each prompt's index and what the model has read of it (Memory), in the order of the tree; the caller may extend it.

    At most a few caches of the longest prompt exist at once, one for each branching above the
    present prompt. If the model does not continue exactly from a cache, the memory is the prompt
    itself and nothing is shared.

    Args:
        reader: the model.
        prompts: (B, T) each, on the model's device.
        node: their tree, or a part of it.
        progress: called with the number of tokens that were read.
        memory: what was read before node; None: nothing. It is extended.
    """
    memory = reader.empty(len(prompts[0])) if memory is None else memory
    memory = reader.read(memory, prompts[node.prompt][:, node.start : node.stop], progress or (lambda tokens: None))
    for i in node.ends:
        yield i, branch(memory)
    for child in node.children[:-1]:
        yield from prefill(reader, prompts, child, progress, branch(memory))
    if node.children:
        yield from prefill(reader, prompts, node.children[-1], progress, memory)
