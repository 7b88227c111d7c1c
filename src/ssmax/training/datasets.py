"""Data sets of a training, in an order that depends only on the seed: windows of a token stream, and examples of a task."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ssmax.errors import UserError

# Tokens of text in the shortest example of a task.
SOME_TEXT = 8


class Windows(Dataset):
    """The training stream cut into windows. All windows come once, then all again in another order; the seed sets the orders.

    The order of one pass is in memory, 4 bytes for each window (1.5 GiB for the paper's 410
    million). It is drawn when the pass begins. It is a random permutation, so that windows of one
    document meet in a step only by chance.

    Args:
        tokens: (T,) integers with len and slices, such as ssmax.data.shards.Shards.
        length: tokens of a window.
        count: number of windows to return.
        seed: seed of the order.

    Raises:
        UserError: tokens has less than one window, or more than 2^32.
    """

    def __init__(self, tokens: Any, length: int, count: int, seed: int):
        self.available = len(tokens) // length
        if self.available == 0:
            raise UserError(
                f"the training text has {len(tokens)} tokens, less than one window of {length}; give more text"
            )
        if self.available > np.iinfo(np.uint32).max:
            raise UserError(f"the training text has {self.available:,} windows of {length}, more than 2^32; give less")
        self.tokens, self.length, self.count, self.seed = tokens, length, count, seed
        self.epoch = -1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        epoch, at = divmod(index, self.available)
        self._draw(epoch)
        start = int(self.order[at]) * self.length
        window = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        return {"input_ids": window, "labels": window}

    def _draw(self, epoch):
        """Draw the order of a pass. The generator continues from pass to pass."""
        if epoch < self.epoch or self.epoch < 0:
            self.rng, self.epoch = np.random.default_rng(self.seed), -1
        while self.epoch < epoch:
            self.order = np.arange(self.available, dtype=np.uint32)
            self.rng.shuffle(self.order)
            self.epoch += 1


class Examples(Dataset):
    """Examples of a task, which grow longer during the training. The loss is that of the answer only.

    Args:
        draw: (length, generator) -> an example whose prompt and answer have length tokens together.
        shortest: tokens of an example without text around what is asked for.
        longest: tokens of the longest example.
        batch_size: examples of a step.
        steps: number of steps.
        seed: seed of lengths and examples.
    """

    def __init__(
        self,
        draw: Callable[[int, np.random.Generator], Any],
        shortest: int,
        *,
        longest: int,
        batch_size: int,
        steps: int,
        seed: int,
    ):
        self.draw, self.longest, self.batch_size, self.steps, self.seed = draw, longest, batch_size, steps, seed
        self.shortest = shortest + SOME_TEXT
        if self.shortest > longest:
            raise UserError(
                f"an example of the task has at least {self.shortest} tokens and the training window only {longest}; "
                "raise --train-length"
            )

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step = index // self.batch_size
        grown = min(1.0, 0.15 + 2 * step / self.steps)
        longest = self.shortest + int((self.longest - self.shortest) * grown)
        # The length depends on the batch and the example on the index alone, so that neither depends on ranks or order.
        length = int(np.random.default_rng([self.seed, step]).integers(self.shortest, longest + 1))
        example = self.draw(length, np.random.default_rng([self.seed, step, index]))
        tokens = torch.tensor(example.prompt + example.answer)
        labels = tokens.clone()
        labels[: len(example.prompt)] = -100
        return {"input_ids": tokens, "labels": labels}
