"""The tasks of a recipe in the tokens of its corpus: needles, and counting, a counter-test that needs flat attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ssmax.data.corpus import Corpus
from ssmax.errors import UserError
from ssmax.evaluation import NeedleTask
from ssmax.evaluation.reading import eval_mode
from ssmax.paper.recipes import Recipe


@dataclass(frozen=True)
class CountExample:
    """One prompt, and the number of marks in it as a token."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class CountTask:
    """Text with 0 to 9 marks, the word " Tokyo", at random places, and the question for their number.

    Attributes:
        encode: text -> token ids, without special tokens; a digit after a space must be one token.
        haystack: (T,) token ids of the text around them.
    """

    encode: Callable[[str], list[int]]
    haystack: np.ndarray

    @property
    def shortest(self) -> int:
        """Tokens of an example without text around the marks."""
        return 9 * len(self.encode(" Tokyo")) + len(self.encode("\nThe Tokyo number is: 9"))

    def example(self, length: int, rng: np.random.Generator) -> CountExample:
        """Draw an example whose prompt and answer have length tokens; all counts are equally likely."""
        count = int(rng.integers(10))
        mark, question, answer = (self.encode(text) for text in (" Tokyo", "\nThe Tokyo number is:", f" {count}"))
        room = length - count * len(mark) - len(question) - len(answer)
        start = int(rng.integers(0, len(self.haystack) - room + 1))
        text = self.haystack[start : start + room].tolist()
        for at in sorted(rng.integers(0, room + 1, count).tolist(), reverse=True):
            text[at:at] = mark
        return CountExample(text + question, answer)


@torch.inference_mode()
def counted(model: PreTrainedModel, examples: Sequence[CountExample]) -> list[bool]:
    """Return whether the most likely next token is the right number, for prompts of one length."""
    prompts = torch.tensor([example.prompt for example in examples], device=model.device)
    with eval_mode(model):
        chosen = model(input_ids=prompts, logits_to_keep=1).logits[:, -1].argmax(-1)
    return [token == example.answer[0] for token, example in zip(chosen.tolist(), examples, strict=True)]


def count_task(corpus: Corpus, haystack: Any) -> CountTask:
    """Return the counting task in tokens of the corpus. Raise UserError if a number is not one token."""
    split = [count for count in range(10) if len(corpus.encode(f" {count}")) != 1]
    if split:
        raise UserError(
            f"the tokenizer makes more than one token of ' {split[0]}', but counting needs numbers of one token; leave "
            "counting out with an empty --counting, or give another --tokenizer"
        )
    return CountTask(corpus.encode, haystack)


def needle_task(corpus: Corpus, recipe: Recipe, haystack: Any) -> NeedleTask:
    """Return the needle task in tokens of the corpus."""
    return NeedleTask(corpus.encode, haystack, recipe.needle_digits)
