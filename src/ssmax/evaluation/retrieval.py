"""A model's answers to retrieval tasks: exact match, first digit and needle scores (the paper's Figures 6 to 8)."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssmax.evaluation.attention import attend, span_scores, stacked
from ssmax.evaluation.prefix import Node, prefill, prefix_tree, size
from ssmax.evaluation.reading import Reader, eval_mode
from ssmax.evaluation.tasks import NeedleExample

CHUNK = 4096


@dataclass(frozen=True)
class RetrievalTrial:
    """The result of one example.

    Attributes:
        correct: whether the whole answer was right.
        first_digit: whether the answer was right up to the token of its first digit.
        by_layer: needle score of each head, (heads,) by the layer's index. Empty if the model has
            no attention weights.
        problem: if the model has attention but no scores, the reason; else None.
    """

    correct: bool
    first_digit: bool
    by_layer: dict[int, Tensor]
    problem: str | None = None

    @property
    def scores(self) -> Tensor:
        """The needle scores, (layers, heads). Raises ValueError if the number of heads differs by layer."""
        return stacked(self.by_layer)


def retrieve(model: PreTrainedModel, examples: Sequence[NeedleExample], *, chunk: int = CHUNK) -> list[RetrievalTrial]:
    """Return the results of examples of equal length. An answer is right if greedy decoding gives exactly its tokens.

    Args:
        model: a causal language model of transformers.
        examples: at least one; they run as one batch.
        chunk: positions in each forward pass. Fewer need less memory.

    Raises:
        ValueError: the lengths of the prompts or of the answers differ, or there is no example.
    """
    if len({(len(example.prompt), len(example.answer)) for example in examples}) != 1:
        raise ValueError("retrieve needs at least one example, and all of one prompt and answer length")
    return [trial[0] for trial in retrieve_grid(model, [{0: example} for example in examples], chunk=chunk)]


@torch.inference_mode()
def retrieve_grid(
    model: PreTrainedModel,
    trials: Sequence[Mapping[Any, NeedleExample]],
    *,
    chunk: int = CHUNK,
    progress: Callable[[int], Any] | None = None,
) -> list[dict[Any, RetrievalTrial]]:
    """Return the result of each cell of each trial. An answer is right if greedy decoding gives exactly its tokens.

    A prefix that prompts of a trial share is read once. Trials whose prompts have the same lengths
    run as one batch.

    Args:
        model: a causal language model of transformers.
        trials: for each trial, its cells and their examples, as a task's grid returns them. All
            trials have the same cells.
        chunk: positions in each forward pass. Fewer need less memory.
        progress: called with the number of tokens that were read.

    Returns:
        For each trial, cell -> RetrievalTrial.

    Raises:
        ValueError: the model is not causal.
        FloatingPointError: logits that are NaN.

    Example:
        >>> task = NeedleTask(encode, haystack)
        >>> trials = [task.grid([(1024, 0.5), (4096, 0.5)], np.random.default_rng(seed)) for seed in range(4)]
        >>> [trial[4096, 0.5].correct for trial in retrieve_grid(model, trials)]
    """
    if not trials:
        return []
    found: list[dict[Any, RetrievalTrial]] = [{} for _ in trials]
    with eval_mode(model):
        longest = max((example.prompt for example in trials[0].values()), key=len)
        reader = Reader(model, torch.tensor([longest]), chunk)
        for members, examples, prompts, tree in _batches(trials):
            prompts = [prompt.to(model.device) for prompt in prompts]
            # _answer reads the last token of a prompt, with its attention weights.
            before = [prompt[:, :-1] for prompt in prompts]
            for cell, memory in prefill(reader, before, tree, progress):
                name = list(examples)[cell]
                for row, trial in zip(members, _answer(reader, prompts[cell], memory, examples[name]), strict=True):
                    found[row][name] = trial
    if problem := found[0][next(iter(found[0]))].problem:
        warnings.warn(f"no needle scores: {problem}", stacklevel=2)
    return found


def grid_tokens(trials: Sequence[Mapping[Any, NeedleExample]]) -> int:
    """Return the number of tokens that retrieve_grid prefills."""
    return sum(len(members) * size(tree) for members, _, _, tree in _batches(trials))


def _batches(trials) -> list[tuple[list[int], dict[Any, list[NeedleExample]], list[Tensor], Node]]:
    """Group trials of the same lengths; return their indices, examples and prompts by cell, and tree of prefixes."""
    groups = defaultdict(list)
    for index, trial in enumerate(trials):
        groups[tuple((len(x.prompt), len(x.answer)) for x in trial.values())].append(index)
    batches = []
    for members in groups.values():
        examples = {name: [trials[i][name] for i in members] for name in trials[members[0]]}
        prompts = [torch.tensor([x.prompt for x in rows]) for rows in examples.values()]
        batches.append((members, examples, prompts, prefix_tree([prompt[:, :-1] for prompt in prompts])))
    return batches


def _answer(reader, prompts, memory, examples):
    answers = torch.tensor([example.answer for example in examples], device=prompts.device)
    # One pass over the true answer: greedy decoding gives the same tokens exactly if each next choice is right.
    logits, weights = attend(reader, memory, torch.cat([prompts[:, -1:], answers[:, :-1]], 1), prompts.shape[1])
    if logits.isnan().any():
        raise FloatingPointError(f"{type(reader.model).__name__} gives logits that are not numbers (nan)")
    right = logits.argmax(-1) == answers
    scores = span_scores(weights.layers, [example.span for example in examples], prompts.shape[1])
    return [
        RetrievalTrial(
            bool(row.all()),
            bool(row[: example.first].all()),
            {layer: of.cpu() for layer, of in score.items()},
            weights.problem,
        )
        for row, score, example in zip(right, scores, examples, strict=True)
    ]
