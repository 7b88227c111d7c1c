"""Sharp decoding: a query reads only the keys and values whose weight can matter, within a certified bound."""

from collections.abc import Callable

import torch
from torch import Tensor

from ssmax.screen import HIDDEN, MIN_KEYS, ScreenedKeys

__all__ = ["forward"]

# Reading single rows costs about this many times as much as streaming them all.
MOST_KEPT = 0.15
MAX_QUERIES = 8


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    multiplier: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    softcap: None,
    scale: float,
    dropout_p: float,
    tolerance: float,
    screen: ScreenedKeys | None,
    plain: Callable[..., Tensor],
) -> Tensor:
    """Arguments as in the reference, and three more. No gradients, no softcap, no dropout, no bias.

    A key whose score lies below the largest by more than log(N / tolerance) weighs less than tolerance / N. Leaving
    out keys of total weight <= tolerance moves the output by at most 2 tolerance max|v|, whatever was left out.

    Args:
        tolerance: of the weight of each row, in (0, 1).
        screen: bounds for key. Without it all keys are read, and only values left out.
        plain: the kernel for what does not pay: short caches, many queries, windows, flat heads.
    """
    options = {"is_causal": is_causal, "window": window, "softcap": None, "scale": scale, "dropout_p": 0.0}
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries > MAX_QUERIES or num_keys < MIN_KEYS or window is not None or key.device.type != "cpu":
        return plain(query, key, value, multiplier, mask=mask, **options)
    screened = screen is not None and screen.ready()
    if not screened and key.dtype not in (torch.float32, torch.float64):
        return plain(query, key, value, multiplier, mask=mask, **options)
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    scaled = query.double() * (multiplier * scale).double()[..., None]
    visible = _visible(mask, is_causal, query, num_keys)
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    flat = []
    for batch in range(query.shape[0]):
        for head in range(heads):
            mine = slice(head * groups, (head + 1) * groups)
            rows = scaled[batch, mine].flatten(0, 1)
            seen = None if visible is None else visible[batch, mine].flatten(0, 1)
            found = _screened(screen, batch, head, rows, seen, tolerance) if screened else None
            if found is None and screened:
                flat.append((batch, head))
                continue
            inputs = rows, key[batch, head], value[batch, head], seen
            got = _attend(*inputs, found) if screened else _skip_values(*inputs, tolerance)
            output[batch, mine] = got.view(groups, num_queries, -1)
    if len(flat) == query.shape[0] * heads:
        return plain(query, key, value, multiplier, mask=mask, **options)
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


def _screened(screen, batch, head, rows, seen, tolerance):
    """The keys to read, or None where reading all costs no more."""
    if not screen.worth_trying(batch, head):
        return None
    screening = screen.screening(batch, head, rows)
    if seen is not None:
        screening.products[:, : seen.shape[1]].masked_fill_(~seen, HIDDEN)
    found = screening.candidates(tolerance, MOST_KEPT)
    screen.remember(batch, head, found is not None)
    return found


def _skip_values(rows, key, value, seen, tolerance):
    """All scores first, then the values that matter."""
    scores = rows.to(key.dtype) @ key.T
    if seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    weights = scores.softmax(-1)
    kept = (weights.amax(0) > tolerance / len(key)).nonzero()[:, 0]
    if len(kept) <= MOST_KEPT * len(key):
        return _attend(rows, key, value, seen, kept)
    return weights.nan_to_num(0.0) @ value


def _attend(rows, key, value, seen, kept):
    """Attention over the kept keys; scores in float64, since a rounded score of thousands is no score."""
    scores = rows @ key.index_select(0, kept).double().T
    if seen is not None:
        scores.masked_fill_(~seen.index_select(1, kept), -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    values = value.index_select(0, kept)
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return weights.to(wide) @ values.to(wide)


def _runs(flat):
    """Heads that lie side by side as (batch, first, last): one call of the kernel each."""
    runs = []
    for batch, head in flat:
        if runs and runs[-1][0].start == batch and runs[-1][2] == head:
            runs[-1] = (runs[-1][0], runs[-1][1], head + 1)
        else:
            runs.append((slice(batch, batch + 1), head, head + 1))
    return runs
