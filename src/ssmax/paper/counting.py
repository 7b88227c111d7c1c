"""A task that wants flat attention: how often does a word stand in the text? The counter-test of sharpening."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ssmax.evaluation.mode import eval_mode

__all__ = ["CountExample", "CountTask", "counted"]


@dataclass(frozen=True)
class CountExample:
    """One prompt, and the number of marks in it as a token."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class CountTask:
    """Text with 0 to 9 marks, the word " Tokyo", at random places, and the question for their number.

    Attributes:
        encode: text -> token ids, without special tokens; a digit behind a space must be one token.
        haystack: (T,) token ids of the text around them.
    """

    encode: Callable[[str], list[int]]
    haystack: np.ndarray

    @property
    def shortest(self) -> int:
        """Length of an example without any text around the marks."""
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
