"""Needle in a haystack: a sentence with a number is hidden in real text, and the model is asked for it (Fig. 6 to 8)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssmax.evaluation.mode import eval_mode
from ssmax.evaluation.needle_score import attend_last

__all__ = ["CITIES", "NeedleExample", "NeedleTask", "RetrievalTrial", "retrieve"]

CITIES = ("Tokyo", "Paris", "London", "Berlin", "Madrid", "Rome", "Cairo", "Lima", "Oslo", "Delhi")


@dataclass(frozen=True)
class NeedleExample:
    """One prompt with its answer; span holds the needle's tokens, its first and last + 1 index in the prompt."""

    prompt: list[int]
    answer: list[int]
    span: tuple[int, int]


@dataclass(frozen=True)
class NeedleTask:
    """The paper's needle, "The special magic Tokyo number is: 8106422.", in text, and the question for its number.

    Attributes:
        encode: text -> token ids, without special tokens.
        haystack: (T,) token ids of the text around it.
        digits: length of the number; the paper's is 7.
    """

    encode: Callable[[str], list[int]]
    haystack: np.ndarray
    digits: int = 7

    @property
    def shortest(self) -> int:
        """Length of an example without any text around the needle; the longest of some, where digits share tokens."""
        numbers = np.random.default_rng(0).integers(0, 10, (16, self.digits))
        return max(sum(map(len, self._parts(city, "".join(map(str, n))))) for city in CITIES for n in numbers)

    def _parts(self, city: str, number: str) -> list[list[int]]:
        """Return needle, question and answer in tokens."""
        question = f"\nThe special magic {city} number is:"
        return [self.encode(text) for text in (f"{question} {number}.\n", question, f" {number}")]

    def example(self, length: int, depth: float, rng: np.random.Generator) -> NeedleExample:
        """Draw an example whose prompt and answer have length tokens, the needle at depth in [0, 1] of the text.

        Raises:
            ValueError: no room for needle, question and answer, or a haystack shorter than the text needed.
        """
        city = CITIES[rng.integers(len(CITIES))]
        number = "".join(str(digit) for digit in rng.integers(0, 10, self.digits))
        needle, question, answer = self._parts(city, number)
        room = length - len(needle) - len(question) - len(answer)
        if room < 0 or len(self.haystack) < room:
            raise ValueError(
                f"a needle example of {length} tokens needs {length - room} tokens for needle, question and answer and "
                f"{max(room, 0)} of text; the text has {len(self.haystack)}"
            )
        start = int(rng.integers(0, len(self.haystack) - room + 1))
        text = self.haystack[start : start + room].tolist()
        at = round(depth * room)
        return NeedleExample(text[:at] + needle + text[at:] + question, answer, (at, at + len(needle)))


@dataclass(frozen=True)
class RetrievalTrial:
    """The outcome of one example: whether the whole answer came out, and each head's needle score (layers, heads)."""

    correct: bool
    scores: Tensor


@torch.inference_mode()
def retrieve(model: PreTrainedModel, examples: Sequence[NeedleExample]) -> list[RetrievalTrial]:
    """Ask for the numbers of examples that have equally long prompts and answers; greedy decoding, exact match.

    Raises:
        ValueError: the examples differ in length, or there is none.
    """
    if len({(len(example.prompt), len(example.answer)) for example in examples}) != 1:
        raise ValueError("retrieve needs at least one example, and all of one prompt and answer length")
    prompts, answers = (
        torch.tensor([getattr(example, part) for example in examples], device=model.device)
        for part in ("prompt", "answer")
    )
    with eval_mode(model):
        logits, cache, attention = attend_last(model, prompts)
        # Feeding the true answer and comparing each next choice is exact match of greedy decoding, in one pass.
        rest = model(input_ids=answers[:, :-1], past_key_values=cache, use_cache=True).logits
    chosen = torch.cat([logits[:, None], rest], 1).argmax(-1)
    correct = (chosen == answers).all(1).tolist()
    return [
        RetrievalTrial(ok, weights[:, :, slice(*example.span)].sum(-1))
        for ok, weights, example in zip(correct, attention, examples, strict=True)
    ]
