"""Sharp decoding: a query reads only the keys and values whose weight can matter, within a certified bound."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ssmax.screen import MIN_KEYS, ScreenedKeys

__all__ = ["forward"]

# Reading single rows costs about this many times as much as streaming them all.
MOST_KEPT = 0.05
MAX_QUERIES = 8
FEW = 512  # heads that keep fewer keys are computed together
PART = 4096  # rows read at once, so that the copies stay in the processor's cache


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    multiplier: Tensor,
    *,
    mask: Tensor | None,
    cu_seqlens: None,
    is_causal: bool,
    window: int | None,
    softcap: None,
    scale: float,
    dropout_p: float,
    tolerance: float,
    screen: ScreenedKeys | None,
    plain: Callable[..., Tensor],
) -> Tensor:
    """Arguments as in the reference, and three more. No gradients, packed documents, softcap, dropout or bias.

    A key whose score lies below the largest by more than log(N / tolerance) weighs less than tolerance / N. Leaving
    out keys of total weight <= tolerance moves the output by at most 2 tolerance max|v|, whatever was left out.

    Args:
        tolerance: of the weight of each row, in (0, 1).
        screen: bounds for key. Without it all keys are read, and only values left out.
        plain: the kernel for what does not pay: short caches, many queries, windows, flat heads.
    """
    options = {
        "cu_seqlens": None,
        "is_causal": is_causal,
        "window": window,
        "softcap": None,
        "scale": scale,
        "dropout_p": 0.0,
    }
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries > MAX_QUERIES or num_keys < MIN_KEYS or window is not None or key.device.type != "cpu":
        return plain(query, key, value, multiplier, mask=mask, **options)
    screened = screen is not None and screen.ready()
    if not screened and key.dtype not in (torch.float32, torch.float64):
        return plain(query, key, value, multiplier, mask=mask, **options)
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    rows = (query.double() * (multiplier * scale).double()[..., None]).unflatten(1, (heads, groups)).flatten(2, 3)
    seen = _visible(mask, is_causal, query, num_keys)
    seen = None if seen is None else seen.unflatten(1, (heads, groups)).flatten(2, 3)
    everyone = [(batch, head) for batch in range(query.shape[0]) for head in range(heads)]
    if not screened:
        return _skip_values(everyone, rows, key, value, seen, tolerance).view(*query.shape[:3], -1)
    found = _keys_that_matter(screen, everyone, rows, seen, tolerance)
    flat = [who for who in everyone if who not in found]
    if len(flat) == query.shape[0] * heads:
        return plain(query, key, value, multiplier, mask=mask, **options)
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    by_head = output.unflatten(1, (heads, groups))
    for who, got in _attend(rows, key, value, seen, found):
        by_head[who] = got.unflatten(0, (groups, num_queries))
    m = multiplier.expand(query.shape[:3])
    for batch, first, last in _runs(flat):
        ours, mine = (batch, slice(first, last)), (batch, slice(first * groups, last * groups))
        masked = None if mask is None else mask.expand(*query.shape[:2], -1, -1)[mine]
        output[mine] = plain(query[mine], key[ours], value[ours], m[mine], mask=masked, **options)
    return output


def _visible(mask, is_causal, query, num_keys):
    """(B, H, N, S) bool, or None where every query sees every key."""
    num_queries = query.shape[2]
    if is_causal and num_queries > 1:
        causal = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        mask = causal[None, None] if mask is None else mask & causal
    return None if mask is None else mask.expand(*query.shape[:3], num_keys)


def _keys_that_matter(screen, everyone, rows, seen, tolerance):
    """The keys to read, by head; heads are missing where reading all of them costs no more."""
    heads = [who for who in everyone if screen.worth_trying(*who)]
    if not heads:
        return {}
    at = slice(None) if len(heads) == len(everyone) else [i for i, who in enumerate(everyone) if who in heads]
    visible = None if seen is None else seen.flatten(0, 1)[at]
    found = screen.candidates(rows.flatten(0, 1)[at], heads, visible, tolerance, MOST_KEPT)
    for who, keys in zip(heads, found, strict=True):
        screen.remember(*who, paid=keys is not None)
    return {who: keys for who, keys in zip(heads, found, strict=True) if keys is not None}


def _skip_values(everyone, rows, key, value, seen, tolerance):
    """All scores first, (B, K, R, V) from the values that matter; float32 scores are off by their rounding, as in any kernel."""
    scores = rows.to(key.dtype) @ key.mT
    if seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    weights = scores.softmax(-1)
    needed = weights.amax(2) > tolerance / key.shape[2]
    few = needed.sum(-1, keepdim=True) <= MOST_KEPT * key.shape[2]
    if seen is not None:
        weights.nan_to_num_(0.0)
    if not few.any():
        return weights @ value
    needed = (needed & few).flatten(0, 1).nonzero()
    counts = torch.bincount(needed[:, 0], minlength=len(everyone)).tolist()
    found = {who: keys for who, keys in zip(everyone, needed[:, 1].split(counts), strict=True) if len(keys)}
    output = value.new_empty(*rows.shape[:3], value.shape[-1])
    for who, got in _attend(rows, key, value, seen, found):
        output[who] = got
    for who in everyone:
        if who not in found:
            output[who] = weights[who] @ value[who]
    return output


def _attend(rows, key, value, seen, found):
    """Yield each head and its attention over the keys found, (R, V); scores in float64: a rounded one of thousands is none."""
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    few = [who for who in found if len(found[who]) <= FEW]
    if few:  # all of them at once, padded
        kept = pad_sequence([found[who] for who in few], batch_first=True, padding_value=-1)
        batch, head = torch.tensor(few).T[..., None].unbind()
        at = (batch, head, kept.clamp(min=0))
        hidden = (kept < 0)[:, None]
        if seen is not None:
            hidden = hidden | ~seen.transpose(2, 3)[at].mT
        scores = rows[batch[:, 0], head[:, 0]] @ key[at].double().mT
        weights = _softmax(scores.masked_fill_(hidden, -torch.inf), seen)
        yield from zip(few, weights.to(wide) @ value[at].to(wide), strict=True)
    for who in found:
        if len(found[who]) > FEW:
            parts = found[who].split(PART)
            scores = torch.cat([rows[who] @ key[who].index_select(0, part).double().T for part in parts], -1)
            if seen is not None:
                scores.masked_fill_(~seen[who].index_select(1, found[who]), -torch.inf)
            weights = _softmax(scores, seen).to(wide)
            output = weights.new_zeros(weights.shape[0], value.shape[-1])
            for part, mine in zip(parts, weights.split(PART, -1), strict=True):
                output.addmm_(mine, value[who].index_select(0, part).to(wide))
            yield who, output


def _softmax(scores, seen):
    """A row that sees nothing gets zeros; where every row sees something, what is not a number stays to be seen."""
    weights = scores.softmax(-1)
    return weights if seen is None else weights.nan_to_num_(0.0)


def _runs(flat):
    """Heads that lie side by side as (batch, first, last): one call of the kernel each."""
    runs = []
    for batch, head in flat:
        if runs and runs[-1][0].start == batch and runs[-1][2] == head:
            runs[-1] = (runs[-1][0], runs[-1][1], head + 1)
        else:
            runs.append((slice(batch, batch + 1), head, head + 1))
    return runs
