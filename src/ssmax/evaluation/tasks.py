"""Retrieval tasks as token ids: needles in text, and letters with digits. No model is needed to build them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["CITIES", "ABCDigits", "NeedleExample", "NeedleTask", "PromptForm", "depth_grid"]

CITIES = ("Tokyo", "Paris", "London", "Berlin", "Madrid", "Rome", "Cairo", "Lima", "Oslo", "Delhi")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Cell = tuple[int, float]  # length and depth


@dataclass(frozen=True)
class NeedleExample:
    """One prompt with its answer.

    Attributes:
        prompt: token ids.
        answer: token ids that continue it.
        span: the needle's tokens, first and last + 1 index in the prompt.
        first: tokens of the answer up to and with the number's first digit.
    """

    prompt: list[int]
    answer: list[int]
    span: tuple[int, int]
    first: int = 1


@dataclass(frozen=True)
class PromptForm:
    """How a context and its question become a prompt.

    Attributes:
        head: token ids before the context: what the tokenizer puts first, and a chat's opening.
        tail: a chat's token ids from the end of the question to the start of the reply; None for a base model, which
            has no question and just continues.
    """

    head: tuple[int, ...] = ()
    tail: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tokenizer: Any, style: Literal["base", "chat"]) -> "PromptForm":
        """Return the form for a tokenizer: "base", or "chat" by its chat template.

        Raises:
            ValueError: "chat", and the tokenizer has no chat template, or one that changes the message.
        """
        if style == "base":
            with_special, bare = (tokenizer("a", add_special_tokens=x)["input_ids"] for x in (True, False))
            return cls(tuple(with_special[: with_special.index(bare[0])]))
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; use the prompt for base models")
        marker = "\u241fcontext\u241f"
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
        )
        head, found, tail = whole.partition(marker)
        if not found:
            raise ValueError("the tokenizer's chat template changes the message; use the prompt for base models")
        return cls(*(tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (head, tail)))

    def ending(self, encode: Callable[[str], list[int]], question: str, lead: str) -> list[int]:
        """Return what follows the context: a chat asks the question and begins the reply with lead; a base model reads lead."""
        if self.tail is None:
            return encode(lead)
        return encode(f"\n\n{question}") + list(self.tail) + encode(lead.lstrip("\n"))


def depth_grid(lengths: Sequence[int], depths: Sequence[float]) -> list[Cell]:
    """Return all cells of a grid."""
    return list(itertools.product(lengths, depths))


@dataclass(frozen=True)
class NeedleTask:
    """The paper's needle, "The special magic Tokyo number is: 8106422.", in text, and the question for its number.

    Attributes:
        encode: text -> token ids, without special tokens.
        haystack: (T,) token ids of the text around it.
        digits: length of the number; the paper's is 7.
        distractors: needles of other cities at random depths, which are not asked.
        several: the context holds a needle of another city at each depth of the grid, and each is asked in its turn.
        form: how the prompt is made.
    """

    encode: Callable[[str], list[int]]
    haystack: np.ndarray
    digits: int = 7
    distractors: int = 0
    several: bool = False
    form: PromptForm = PromptForm()

    @property
    def shortest(self) -> int:
        """Length of an example without any text around the needle; the longest of some, where digits share tokens."""
        numbers = np.random.default_rng(0).integers(0, 10, (16, self.digits))
        return max(sum(map(len, self._parts(city, "".join(map(str, n))))) for city in CITIES for n in numbers)

    def _parts(self, city: str, number: str) -> list[list[int]]:
        """Return needle, what follows the context, and answer in tokens."""
        lead = f"\nThe special magic {city} number is:"
        ending = self.form.ending(self.encode, f"What is the special magic {city} number?", lead)
        return [self.encode(f"{lead} {number}.\n"), ending, self.encode(f" {number}")]

    def example(self, length: int, depth: float, rng: np.random.Generator) -> NeedleExample:
        """Draw an example whose prompt and answer have length tokens, the needle at depth in [0, 1] of the text.

        Raises:
            ValueError: no room for needle, question and answer, or a haystack shorter than the text needed.
        """
        return self.grid([(length, depth)], rng)[length, depth]

    def grid(self, cells: Sequence[Cell], rng: np.random.Generator) -> dict[Cell, NeedleExample]:
        """Draw one trial: an example for each (length, depth), all of the same text, cities and numbers.

        Contexts of one trial share long prefixes: they begin at the same place of the text.

        Raises:
            ValueError: as example, or more needles than cities.
        """
        depths = sorted({depth for _, depth in cells})
        extra = len(depths) - 1 if self.several else self.distractors
        if extra >= len(CITIES):
            raise ValueError(f"a context has at most {len(CITIES)} needles, one for each city, got {extra + 1}")
        first_city = rng.integers(len(CITIES))
        numbers = [self._number(rng)]
        longest = max(length for length, _ in cells)
        needs = self._parts(CITIES[first_city], numbers[0])
        start = int(rng.integers(0, max(1, len(self.haystack) - (longest - sum(map(len, needs))) + 1)))
        # Drawn last: a single needle's examples do not depend on what other tasks draw.
        others = [c for c in rng.permutation(len(CITIES)).tolist() if c != first_city][:extra] if extra else []
        numbers += [self._number(rng) for _ in others]
        parts = [self._parts(CITIES[c], n) for c, n in zip([first_city, *others], numbers, strict=True)]
        elsewhere = rng.random(extra).tolist()
        found = {}
        for length, depth in cells:
            if self.several:
                found[length, depth] = self._place(length, depths, parts, depths.index(depth), start)
            else:
                found[length, depth] = self._place(length, [depth, *elsewhere], parts, 0, start)
        return found

    def _number(self, rng):
        return "".join(str(digit) for digit in rng.integers(0, 10, self.digits))

    def _place(self, length, depths, parts, asked, start):
        """The context with every needle at its depth, and the question for one of them."""
        _, ending, answer = parts[asked]
        # One room for all questions about a context, so that it is the same context.
        questions = [len(ending) + len(answer) for _, ending, answer in (parts if self.several else [parts[asked]])]
        room = length - len(self.form.head) - sum(len(needle) for needle, _, _ in parts) - max(questions)
        if room < 0 or len(self.haystack) - start < room:
            raise ValueError(
                f"a needle example of {length} tokens needs {length - room} tokens for needle, question and answer and "
                f"{max(room, 0)} of text; the text has {len(self.haystack) - start}"
            )
        text = self.haystack[start : start + room].tolist()
        context, done, span = list(self.form.head), 0, (0, 0)
        for depth, index in sorted((depth, index) for index, depth in enumerate(depths)):
            at = round(depth * room)
            context += text[done:at]
            done = at
            needle = parts[index][0]
            if index == asked:
                span = (len(context), len(context) + len(needle))
            context += needle
        return NeedleExample(context + text[done:] + ending, answer, span, _until_digit(self.encode, answer))


@dataclass(frozen=True)
class ABCDigits:
    """26 letters, each with a number of 6 digits, as lines "A=482910"; one letter is asked, and stands there once.

    The lines of the other 25 fill the context in random order. Nothing has to be understood, so that base models
    answer it without fine-tuning.

    Attributes:
        encode: text -> token ids, without special tokens.
        digits: of each number.
        form: how the prompt is made.
    """

    encode: Callable[[str], list[int]]
    digits: int = 6
    form: PromptForm = PromptForm()

    def grid(self, cells: Sequence[Cell], rng: np.random.Generator) -> dict[Cell, NeedleExample]:
        """Draw one trial: an example for each (length, depth) of at most length tokens, with the same lines.

        Raises:
            ValueError: no room for a line, the question and the answer.
        """
        letters = [LETTERS[i] for i in rng.permutation(len(LETTERS))]
        numbers = ["".join(map(str, rng.integers(0, 10, self.digits))) for _ in letters]
        lines = [self.encode(f"{x}={number}\n") for x, number in zip(letters, numbers, strict=True)]
        needle, others = lines[0], lines[1:]
        ending = self.form.ending(self.encode, f"Which number does {letters[0]} have?", f"{letters[0]}=")
        answer = self.encode(numbers[0])
        fixed = len(self.form.head) + len(needle) + len(ending) + len(answer)
        longest = max(length for length, _ in cells)
        order = rng.integers(0, len(others), max(1, longest // min(map(len, others)))).tolist()
        found = {}
        for length, depth in cells:
            if length < fixed:
                raise ValueError(f"an example of {length} tokens needs {fixed} for one line, question and answer")
            sizes = np.cumsum([len(others[i]) for i in order])
            count = int(np.searchsorted(sizes, length - fixed, side="right"))
            at = round(depth * count)
            before, after = ([t for i in part for t in others[i]] for part in (order[:at], order[at:count]))
            head = [*self.form.head, *before]
            span = (len(head), len(head) + len(needle))
            found[length, depth] = NeedleExample(head + needle + after + ending, answer, span)
        return found


def _until_digit(encode, answer):
    """Tokens of " 8106422" up to and with the one that holds its first digit: the space may be a token of its own."""
    space = encode(" ")
    return len(space) + 1 if answer[: len(space)] == space else 1
