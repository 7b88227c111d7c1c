"""Retrieval tasks as token ids: needles in text, and letters with digits. No model is needed to build them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

CITIES = ("Tokyo", "Paris", "London", "Berlin", "Madrid", "Rome", "Cairo", "Lima", "Oslo", "Delhi")
# A tokenizer with a small vocabulary keeps these whole; otherwise the sentence would not fit into a small window.
NEEDLE_WORDS = ("The", " special", " magic", " number", " is:", *(f" {x}" for x in (*CITIES, *range(10))))
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Cell = tuple[int, float]  # length and depth
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class NeedleExample:
    """One prompt with its answer.

    Attributes:
        prompt: token ids.
        answer: token ids that continue the prompt.
        span: index of the needle's first token in the prompt, and index after its last.
        first: number of tokens of the answer up to the number's first digit, included.
    """

    prompt: list[int]
    answer: list[int]
    span: tuple[int, int]
    first: int = 1


@dataclass(frozen=True)
class PromptForm:
    """How a context and a question become a prompt.

    Attributes:
        head: token ids before the context: the tokenizer's first tokens, and the opening of a chat.
        opening: the opening of a chat as text, whose tokens are in head; "" for a base model.
        tail: text of a chat between the question and the reply. None for a base model, which
            continues the text without a question.
    """

    head: tuple[int, ...] = ()
    opening: str = ""
    tail: str | None = None

    @classmethod
    def of(cls, tokenizer: Any, style: Literal["base", "chat"]) -> "PromptForm":
        """Return the form for a tokenizer: "base", or "chat" by its chat template.

        Raises:
            ValueError: the tokenizer has no chat template, or one that changes the message
                ("chat"); or it encodes a word differently next to special tokens ("base").
        """
        if style == "base":
            with_special, bare = (tokenizer("a", add_special_tokens=x)["input_ids"] for x in (True, False))
            for start in range(len(with_special) - len(bare) + 1):
                if bare and with_special[start : start + len(bare)] == bare:
                    return cls(tuple(with_special[:start]))
            raise ValueError("the tokenizer encodes the first word of a text differently if special tokens surround it")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; use the prompt for base models")
        marker = "\u241fcontext\u241f"
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
        )
        opening, found, tail = whole.partition(marker)
        if not found:
            raise ValueError("the tokenizer's chat template changes the message; use the prompt for base models")
        return cls(tuple(tokenizer(opening, add_special_tokens=False)["input_ids"]), opening, tail)

    def ending(self, question: str, lead: str) -> str:
        """Return the text after the context: in a chat the question and then lead, which begins the reply; else only lead."""
        return lead if self.tail is None else f"\n\n{question}{self.tail}" + lead.lstrip("\n")

    def encoded(self, encode: Encode, text: str) -> list[int]:
        """Return the tokens of a prompt that begins with text."""
        return encode(self.opening + text) if self.opening else [*self.head, *encode(text)]


# A tokenizer may treat the start of a text specially (SentencePiece adds a space), and may join two pieces into one token.
# Therefore a piece is never encoded alone, but after one of these words.
BEFORE = ("x", ".", "text.", "1")


def _inside(encode: Encode, text: str) -> list[int]:
    """Return the tokens of text as it stands in the middle of a longer one."""
    for word in BEFORE:
        alone, joint = encode(word), encode(word + text)
        if alone and joint[: len(alone)] == alone:
            return joint[len(alone) :]
    raise ValueError(
        f"the tokenizer joins {text[:20]!r} with the text before it into one token, so the needle has no tokens of its own"
    )


@dataclass(frozen=True)
class _Asked:
    """The end of a prompt and its answer, cut from the tokens of one text.

    A token that holds the end of the prompt and the beginning of the answer belongs to the answer.
    So does a token that holds the answer's last digit and the text after it, since a model that
    continues the text gives this token.

    Attributes:
        prompt: tokens before the answer.
        answer: tokens of the answer.
        first: number of the answer's tokens up to its first digit, included.
    """

    prompt: list[int]
    answer: list[int]
    first: int

    @classmethod
    def of(cls, encode: Encode, prompt: str, space: str, number: str, stop: str) -> "_Asked":
        """Encode prompt + space + number + stop, and cut it before the answer, which is space + number."""
        whole = encode(f"{prompt}{space}{number}{stop}")
        # The same text with all digits changed: tokens that differ hold digits.
        other = encode(f"{prompt}{space}{number.translate(OTHER_DIGITS)}{stop}")
        first, stop_at = _shared(whole, other), len(whole) - _shared(whole[::-1], other[::-1])
        start = min(first, _shared(whole, encode(prompt)))
        if first >= stop_at:
            raise ValueError(
                f"the tokenizer encodes the number {number} like another number; its vocabulary lacks digits"
            )
        return cls(whole[:start], whole[start:stop_at], first - start + 1)


OTHER_DIGITS = str.maketrans("0123456789", "5678901234")


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens that two sequences share at their beginning."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in alike)


def depth_grid(lengths: Sequence[int], depths: Sequence[float]) -> list[Cell]:
    """Return all cells (length, depth) of a grid."""
    return list(itertools.product(lengths, depths))


@dataclass(frozen=True)
class NeedleTask:
    """The paper's needle, "The special magic Tokyo number is: 8106422.", hidden in text, and the question for its number.

    Attributes:
        encode: text -> token ids, without special tokens.
        haystack: (T,) token ids of the text.
        digits: digits of the number (the paper: 7).
        distractors: number of needles for other cities, at random depths, that are not asked for.
        several: put a needle for a different city at each depth of the grid, and ask for each in
            turn.
        form: how the prompt is made.

    Example:
        >>> task = NeedleTask(encode, np.array(encode(text)))
        >>> trial = task.grid([(1024, 0.0), (1024, 0.5)], np.random.default_rng(0))
    """

    encode: Encode
    haystack: np.ndarray
    digits: int = 7
    distractors: int = 0
    several: bool = False
    form: PromptForm = PromptForm()

    @property
    def shortest(self) -> int:
        """Tokens of an example without text around the needle; the longest of a sample, since digits may share tokens."""
        numbers = np.random.default_rng(0).integers(0, 10, (16, self.digits))
        return max(self._parts(city, "".join(map(str, n))).size for city in CITIES for n in numbers)

    def _parts(self, city: str, number: str) -> "_Parts":
        return _parts(self.encode, self.form, city, number)

    def example(self, length: int, depth: float, rng: np.random.Generator) -> NeedleExample:
        """Draw an example whose prompt and answer have length tokens together, with the needle at depth in [0, 1] of the text.

        Raises:
            ValueError: no room for needle, question and answer, or the haystack is too short.
        """
        return self.grid([(length, depth)], rng)[length, depth]

    def grid(self, cells: Sequence[Cell], rng: np.random.Generator) -> dict[Cell, NeedleExample]:
        """Draw one trial: an example for each (length, depth), with the same text, cities and numbers.

        Contexts of one trial share long prefixes, since they begin at the same place of the text.

        Raises:
            ValueError: as in example, or there are more needles than cities.
        """
        depths = sorted({depth for _, depth in cells})
        extra = len(depths) - 1 if self.several else self.distractors
        if extra >= len(CITIES):
            raise ValueError(f"a context has at most {len(CITIES)} needles, one for each city, got {extra + 1}")
        first_city = rng.integers(len(CITIES))
        numbers = [self._number(rng)]
        longest = max(length for length, _ in cells)
        asked = self._parts(CITIES[first_city], numbers[0])
        start = int(rng.integers(0, max(1, len(self.haystack) - (longest - asked.size) + 1)))
        # Drawn last, so that the examples of a single needle do not depend on distractors.
        others = [c for c in rng.permutation(len(CITIES)).tolist() if c != first_city][:extra] if extra else []
        numbers += [self._number(rng) for _ in others]
        parts = [asked, *(self._parts(CITIES[c], n) for c, n in zip(others, numbers[1:], strict=True))]
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
        """Return the context with every needle at its depth, and the question for one of them."""
        # All questions about a context leave the same room for text, so that the context is the same.
        needles = sum(len(part.needle) for part in parts)
        room = (
            length
            - len(self.form.head)
            - needles
            - max(part.size - len(part.needle) for part in (parts if self.several else [parts[asked]]))
        )
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
            needle = parts[index].needle
            if index == asked:
                span = (len(context), len(context) + len(needle))
            context += needle
        end = parts[asked].asked
        return NeedleExample(context + text[done:] + end.prompt, end.answer, span, end.first)


@dataclass(frozen=True)
class _Parts:
    """A needle's tokens, and those that ask for its number."""

    needle: list[int]
    asked: _Asked

    @property
    def size(self) -> int:
        return len(self.needle) + len(self.asked.prompt) + len(self.asked.answer)


@lru_cache(maxsize=4096)  # short numbers come again and again in a training
def _parts(encode: Encode, form: PromptForm, city: str, number: str) -> _Parts:
    lead = f"\nThe special magic {city} number is:"
    ending = form.ending(f"What is the special magic {city} number?", lead)
    asked = _Asked.of(lambda text: _inside(encode, text), ending, " ", number, ".\n")
    return _Parts(_inside(encode, f"{lead} {number}.\n"), asked)


@dataclass(frozen=True)
class ABCDigits:
    """Lines such as "A=482910", one number of 6 digits for each of 26 letters. The letter that is asked for occurs once.

    Lines of the other 25 letters fill the context in random order. The task needs no language, so
    base models can answer it without fine-tuning.

    Attributes:
        encode: text -> token ids, without special tokens.
        digits: digits of each number.
        form: how the prompt is made.

    Example:
        >>> task = ABCDigits(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        >>> trial = task.grid([(1024, 0.5)], np.random.default_rng(0))
    """

    encode: Encode
    digits: int = 6
    form: PromptForm = PromptForm()

    def grid(self, cells: Sequence[Cell], rng: np.random.Generator) -> dict[Cell, NeedleExample]:
        """Draw one trial: an example of at most length tokens for each (length, depth), with the same lines.

        Raises:
            ValueError: no room for a line, the question and the answer.
        """
        letters = [LETTERS[i] for i in rng.permutation(len(LETTERS))]
        numbers = ["".join(map(str, rng.integers(0, 10, self.digits))) for _ in letters]
        lines = [f"{x}={number}\n" for x, number in zip(letters, numbers, strict=True)]
        needle, others = lines[0], lines[1:]
        ending = self.form.ending(f"Which number does {letters[0]} have?", f"{letters[0]}=")
        sizes = [len(self.encode(line + line)) - len(self.encode(line)) for line in others]
        longest = max(length for length, _ in cells)
        order = rng.integers(0, len(others), max(1, longest // min(sizes))).tolist()
        total = np.cumsum([sizes[i] for i in order])
        shortest = self._example("", needle, "", ending, numbers[0])
        fixed = len(shortest.prompt) + len(shortest.answer)
        found = {}
        for length, depth in cells:
            if length < fixed:
                raise ValueError(f"an example of {length} tokens needs {fixed} for one line, question and answer")
            count = int(np.searchsorted(total, length - fixed, side="right"))
            # In all known tokenizers, lines take no more tokens together than one by one; this checks it.
            for kept in range(count, -1, -1):
                at = round(depth * kept)
                before, after = ("".join(others[i] for i in part) for part in (order[:at], order[at:kept]))
                example = self._example(before, needle, after, ending, numbers[0])
                if len(example.prompt) + len(example.answer) <= length:
                    break
            found[length, depth] = example
        return found

    def _example(self, before: str, needle: str, after: str, ending: str, number: str) -> NeedleExample:
        """Return an example made from the tokens of one text, with the place of the needle."""

        def encode(text):
            return self.form.encoded(self.encode, text)

        asked = _Asked.of(encode, before + needle + after + ending, "", number, "\n")
        first, stop = (_shared(asked.prompt, encode(text)) for text in (before, before + needle))
        return NeedleExample(asked.prompt, asked.answer, (first, stop), asked.first)
