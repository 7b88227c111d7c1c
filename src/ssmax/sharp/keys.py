"""ScreenedKeys: a growing cache of keys with an int8 copy, the screen, which gives bounds of the scores."""

import functools
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmax.private import int8_matmul

# With fewer keys there is no screen: reading all of them costs less than choosing.
MIN_KEYS = 4096
BLOCK = 256  # keys whose bounds are computed together
RANGE = 5.0  # int8 covers so many standard deviations of a channel; a key beyond them is always kept
SAMPLE = 2048  # about so many keys of a head that seems flat are tried first
HIDDEN = torch.iinfo(torch.int32).min  # stands for the product of a key that the query may not see


class ScreenedKeys:
    """The keys of a decode with an int8 copy beside them, for attention(..., impl="sharp").

    A key is k = c + w (i + r). c and w are the mean and the width of each channel, i is int8, and r
    is the rounding error. Then q k = q c + (w q) i + (w q) r. Since |(w q) r| <= |w q| |r|, the
    product (w q) i bounds the score from both sides; q c is the same for all keys. |r| is kept for
    each key. A key is rounded once, when it is appended. c and w come from the keys that are there
    when the cache reaches 4,096 keys; before that there is no screen. The screen takes D + 4 bytes
    for each key and head.

    Args:
        keys: the first keys, (B, K, S, D), floating point.

    Raises:
        TypeError: keys are not floating point.
        ValueError: keys do not have four dimensions.

    Example:
        >>> keys = ssmax.ScreenedKeys(torch.randn(1, 8, 8192, 64))
        >>> keys.append(torch.randn(1, 8, 1, 64))
        >>> query, value = torch.randn(1, 8, 1, 64), torch.randn(1, 8, 8193, 64)
        >>> ssmax.attention(query, keys, value, s=0.4, is_causal=True, impl="sharp")
    """

    def __init__(self, keys: Tensor):
        if not isinstance(keys, Tensor) or not keys.is_floating_point():
            raise TypeError(f"keys must be a floating-point tensor, got {getattr(keys, 'dtype', type(keys).__name__)}")
        if keys.ndim != 4:
            raise ValueError(f"keys must be (batch, key heads, length, head size), got shape {tuple(keys.shape)}")
        self._keys = Grown(keys[:, :, :0])
        self._keys.put(keys.detach(), 0)
        self._screened = 0
        self._centre: Any = None
        self._width: Any = None
        self._codes: Any = None
        self._lost: Any = None
        self._most: Any = None
        self._patience: dict[tuple[int, int], tuple[int, int]] = {}
        self.steps = 0
        self._read = np.zeros(keys.shape[:2])

    def __len__(self) -> int:
        return self._keys.length

    @property
    def keys(self) -> Tensor:
        """The keys so far, (B, K, S, D): a view, not a copy."""
        return self._keys.filled

    def append(self, keys: Tensor) -> None:
        """Append keys, (B, K, T, D), of the same dtype. Old keys are copied only when the buffer is full.

        Raises:
            ValueError: another batch, number of heads, head size or dtype.
        """
        have, got = self.keys, tuple(keys.shape)
        if keys.ndim != 4 or (*got[:2], got[3]) != (*have.shape[:2], have.shape[3]) or keys.dtype != have.dtype:
            raise ValueError(
                f"keys to append must be {have.dtype} of shape ({have.shape[0]}, {have.shape[1]}, any, {have.shape[3]}), "
                f"got {keys.dtype} of {got}"
            )
        self._keys.put(keys.detach(), len(self))

    def crop(self, length: int) -> None:
        """Keep the first length keys.

        Raises:
            ValueError: there are fewer keys.
        """
        if not 0 <= length <= len(self):
            raise ValueError(f"length must be 0 to {len(self)}, the number of keys; got {length}")
        self._keys.length = length
        self._screened = min(self._screened, length)

    @property
    def possible(self) -> bool:
        """Whether a screen is possible: enough keys, on the CPU, and an exact int8 product."""
        return len(self) >= MIN_KEYS and self._keys.device.type == "cpu" and int8_is_exact()

    @property
    def screen_bytes(self) -> int:
        """Memory of the screen: the rounded keys and what their bounds need."""
        return sum(x.filled.nbytes for x in (self._codes, self._lost, self._most) if x is not None)

    def ready(self) -> bool:
        """Bring the screen up to date; return False if there is none."""
        if not self.possible:
            return False
        if self._screened < len(self):
            self._round(self._screened)
        return True

    def _round(self, start):
        """Round the keys from start on, and update the largest |r| of their blocks."""
        if self._centre is None:
            keys = self.keys.float()
            self._centre = keys.mean(2, keepdim=True).double()
            self._width = (keys - self._centre).square_().mean(2, keepdim=True).sqrt_() * (RANGE / 127)
            self._width.clamp_(min=1e-200)
            shape = keys.shape[:2]
            self._codes = Grown(torch.zeros(*shape, 0, keys.shape[-1], dtype=torch.int8))
            self._lost, self._most = Grown(torch.zeros(*shape, 0)), Grown(torch.zeros(*shape, 0))
            self._longest = torch.zeros(*shape, dtype=torch.float64)
        for part in self.keys[:, :, start:].split(16 * BLOCK, dim=2):  # limits temporary memory
            scaled = (part.double() - self._centre) / self._width
            codes = scaled.round().clamp_(-127, 127)
            self._codes.put(codes.to(torch.int8), self._screened)
            # Rounded up, since float32 may round down. A key that is not finite is kept, as in plain attention.
            self._lost.put((scaled - codes).norm(dim=-1).mul_(1 + 1e-6).float().nan_to_num(torch.inf), self._screened)
            self._longest = torch.maximum(self._longest, codes.norm(dim=-1).amax(-1))
            self._screened += part.shape[2]
        first = start // BLOCK
        lost = self._lost.filled[:, :, first * BLOCK :]
        self._most.put(
            torch.nn.functional.pad(lost, (0, -lost.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).amax(-1), first
        )

    @np.errstate(all="ignore")  # a head whose query is not finite keeps no key, and is computed in full
    def candidates(
        self, query: Tensor, heads: np.ndarray, visible: Tensor | None, tolerance: float, most_kept: float
    ) -> list[np.ndarray | None]:
        """Return for each head the keys that hold all but a tolerance of every row's weight. Call it only after ready().

        Args:
            query: (T, R, D), float64: T heads, each with R rows that share a key head.
            heads: (T, 2), batch index and key head of each.
            visible: (T, R, S), bool, or None = all.
            tolerance: weight that may be left out of a row.
            most_kept: largest fraction of the keys to return.

        Returns:
            Indices of keys for each head; None for a head that needs more than most_kept.
        """
        size, room = len(self), -(-len(self) // BLOCK) * BLOCK
        at = heads[:, 0], heads[:, 1]
        wide = query.numpy() * self._width.numpy()[at]
        step = np.maximum(np.abs(wide).max(-1, keepdims=True), 1e-250) / 127
        codes = np.rint(wide / step)
        products = torch.empty(len(query), room, query.shape[1], dtype=torch.int32).mT
        narrow, keys = torch.from_numpy(codes.astype(np.int8)), self._codes.room(room)
        for rows, (batch, head), out in zip(narrow, heads.tolist(), products, strict=True):
            int8_product(rows, keys[batch, head], out)
        if size < room:
            products[:, :, size:] = HIDDEN
        if visible is not None:
            products[:, :, :size].masked_fill_(~visible, HIDDEN)
        # Upper limit of the errors by rounding the keys, rounding the query, and the roundings in a key's bound.
        reach = _norm(wide) * (1 + 1e-6)
        margin = (_norm(wide - codes * step) + 2**-20 * reach) * self._longest.numpy()[at][:, None]
        lost, most = self._lost.room(room).numpy(), self._most.filled.numpy()[at][:, : room // BLOCK]
        return _candidates(products, step[..., 0], reach, margin, lost, most, at, size, tolerance, most_kept)

    def worth_trying(self, batch: int, head: int) -> bool:
        """Return whether to try this head's screen in this step. A head that stays flat is tried less and less often."""
        wait, pause = self._patience.get((batch, head), (0, 0))
        if wait:
            self._patience[batch, head] = (wait - 1, pause)
        return wait == 0

    def count(self, found: dict[tuple[int, int], np.ndarray]) -> None:
        """Count a step. Heads that are not in found read all of their keys."""
        self.steps += 1
        self._read += 1.0
        for who, keys in found.items():
            self._read[who] += len(keys) / len(self) - 1.0

    def share_read(self) -> np.ndarray:
        """Return the share of the keys that each head read exactly, (B, K), mean over the steps; 1 before the first step."""
        return self._read / self.steps if self.steps else np.ones_like(self._read)

    def give_up(self) -> None:
        """Drop the screen and free its memory; ready() would build it again."""
        self._screened, self._centre = 0, None
        self._codes = self._lost = self._most = None

    def remember(self, batch: int, head: int, paid: bool) -> None:
        """Note whether this head's screen saved time; if not, wait before the next try."""
        pause = 0 if paid else min(64, 2 * self._patience.get((batch, head), (0, 2))[1] or 4)
        self._patience[batch, head] = (pause, pause)


def _candidates(products, step, reach, margin, lost, most, at, size, tolerance, most_kept):
    """Return the keys to read by head, from bounds of their scores.

    A score is step * product +- (reach * lost + margin), and the largest score of a row is at least
    lowest. This is numpy, whose calls on few numbers take a fifth of the time of torch's.
    """
    by_block, products = products.unflatten(-1, (-1, BLOCK)), products.numpy()
    largest = by_block.amax(-1).numpy()
    spread = reach[..., None] * most[:, None] + margin[..., None]
    lowest = (step[..., None] * largest - spread).max(-1)
    # Half the tolerance is for keys below this floor: all of them together weigh less than it, compared with the largest key alone.
    floor = math.log(tolerance / 2 / size) - 1e-4
    # A key of a block can matter only if its product is at least this. A hidden key's never is.
    least = np.clip(np.floor((lowest[..., None] + floor - spread) / step[..., None]), HIDDEN + 1, -HIDDEN - 1)
    head, block = np.nonzero((largest >= least).any(1))
    possible = (by_block.numpy()[head, :, block] >= least.astype(np.int32)[head, :, block, None]).any(1)
    which, place = np.divmod(np.flatnonzero(possible), BLOCK)
    stops = np.bincount(head[which], minlength=len(step)).cumsum()[:-1]
    kept = np.split(block[which] * BLOCK + place, stops)

    def bounds_of(head, keys):
        """Return upper bounds of scores minus lowest, (number of keys, R)."""
        room = reach[head] * lost[at[0][head], at[1][head], keys][:, None]
        return products[head, :, keys] * step[head] + (margin - lowest)[head] + room

    for head, keys in enumerate(kept):
        if len(keys) > 3 * most_kept * size:
            few = keys[:: 1 + len(keys) // SAMPLE]
            share = (bounds_of(np.full(len(few), head), few) >= floor).any(-1).mean()
            if share * len(keys) > 3 * most_kept * size:
                kept[head] = keys[:0]
    counts = [len(keys) for keys in kept]
    upper = bounds_of(np.repeat(np.arange(len(kept)), counts), np.concatenate(kept))
    needed = (upper >= floor).any(-1)
    result: list[np.ndarray | None] = []
    for head, (keys, stop) in enumerate(zip(kept, itertools.accumulate(counts), strict=True)):
        bounds, matters = (x[stop - len(keys) : stop] for x in (upper, needed))
        if np.count_nonzero(matters) > size / 64:
            spreads = torch.from_numpy(spread[head].max(-1, keepdims=True))
            matters = _by_mass(torch.from_numpy(bounds).T, spreads, tolerance / 2).numpy()
        keys = keys[matters]
        result.append(keys if 0 < len(keys) <= most_kept * size else None)
    return result


def _norm(rows):
    return np.sqrt(np.einsum("trd,trd->tr", rows, rows))


def _by_mass(upper, spread, tolerance):
    """Return which keys are needed if the weights left out are summed, in steps of half a nat, instead of only counted."""
    if not spread.max() <= 10:  # NaN too
        return torch.ones_like(upper[0], dtype=torch.bool)
    weight = upper.exp()
    total = weight.sum(-1, keepdim=True) * (-2 * spread).exp()  # a score is at least its upper bound - 2 spread
    level = (upper + 40).mul_(2).clamp_(0, 127).long()
    mass = torch.zeros(len(upper), 128, dtype=torch.float64).scatter_add_(1, level, weight).cumsum(-1)
    return (level >= (mass <= tolerance * (1 - 1e-4) * total.clamp(min=1.0)).sum(-1, keepdim=True)).any(0)


class Grown:
    """A tensor that grows along its third dimension. Its buffer grows by half, so that appending rarely copies old values."""

    def __init__(self, first: Tensor):
        self._room, self.length = first, first.shape[2]

    @property
    def device(self) -> torch.device:
        """Device of the tensor."""
        return self._room.device

    @property
    def filled(self) -> Tensor:
        """The values written so far: a view."""
        return self._room.narrow(2, 0, self.length)

    def room(self, length: int) -> Tensor:
        """Return the first length places of the buffer, filled or not."""
        return self._room.narrow(2, 0, length)

    def put(self, new: Tensor, start: int) -> None:
        """Write new from start on; the tensor ends after it."""
        stop = start + new.shape[2]
        if stop > self._room.shape[2]:
            size = -(-max(stop, 3 * start // 2) // BLOCK) * BLOCK
            room = new.new_zeros(*new.shape[:2], size, *new.shape[3:])
            room[:, :, :start] = self._room[:, :, :start]
            self._room = room
        self._room[:, :, start:stop] = new
        self.length = stop


def int8_product(query: Tensor, codes: Tensor, out: Tensor) -> None:
    """Write query (R, D) times codes (S, D) transposed into out, (R, S) int32, which must be the transpose of a matrix.

    The codes are the first factor: as the second one they take 1.7 times as long.
    """
    int8_matmul(codes, query.t(), out.t())


@functools.cache
def int8_is_exact() -> bool:
    """Return whether torch multiplies int8 exactly on this machine. Some instruction sets saturate large sums."""
    try:
        ends = torch.tensor([[127, -127]], dtype=torch.int8).repeat(4, 48)
        codes = torch.cat([ends, ends.abs(), -ends.abs(), ends.flip(1)]).repeat(64, 1)
        for rows in (ends, ends.abs(), ends[:1], ends.repeat(16, 1)):
            for size in (16, 64, 96):
                out = torch.empty(len(codes), len(rows), dtype=torch.int32).t()
                int8_product(rows[:, :size], codes[:, :size].contiguous(), out)
                if not torch.equal(out, rows[:, :size].int() @ codes[:, :size].int().T):
                    return False
        return True
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
