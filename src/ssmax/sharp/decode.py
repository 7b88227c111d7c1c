"""Sharp decoding: a query reads only the keys and values whose weight can matter, within a certified bound."""

import numpy as np
import torch
from torch import Tensor

from ssmax.backends import sdpa
from ssmax.backends.call import AttentionCall
from ssmax.sharp.keys import MIN_KEYS

MOST_KEPT = (
    0.05  # a head that keeps a larger share of its keys is flat: streaming all keys is faster than reading single rows
)
MAX_QUERIES = 8
FEW = 512  # heads that keep at most so many keys are computed together
PART = 4096  # rows read at once, so that the copies stay in the processor's cache


def why_not(call: AttentionCall) -> str | None:
    """No gradients, packed documents, softcap, dropout or bias."""
    if call.dropout_p > 0:
        return "has no dropout; use another impl, or dropout_p=0"
    if call.wants_gradient():
        return "is for inference and has no gradients; use torch.no_grad(), or another impl"
    if call.cu_seqlens is not None:
        return "is for a decode step and takes no cu_seqlens; use impl='sdpa'"
    if isinstance(call.mask, Tensor) and call.mask.is_floating_point():
        return "takes no bias; give a bool attn_mask, or use impl='sdpa'"
    return sdpa.why_not(call)  # which computes where a screen does not save time


def check_tolerance(tolerance: float) -> None:
    """Raise ValueError unless it lies in (0, 1)."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be a number between 0 and 1, got {tolerance!r}")


def forward(call: AttentionCall) -> Tensor:
    """Return the output within the tolerance. sdpa computes short caches, many queries, windows and flat heads, where a screen saves no time.

    Of S keys, one whose score is below the largest by more than log(S / tolerance) weighs less than
    tolerance / S. Leaving out keys with a total weight of at most tolerance changes each component
    of the output by at most 2 tolerance max|v|.

    Without a screen all keys are read, and only values are left out.
    """
    check_tolerance(call.tolerance)
    few = call.query.shape[2] <= MAX_QUERIES and call.key.shape[2] >= MIN_KEYS
    if not few or call.window is not None or call.key.device.type != "cpu":
        return sdpa.forward(call)
    # The keys that are read depend on values, which torch.compile cannot trace.
    read = torch.compiler.disable(_read) if torch.compiler.is_compiling() else _read
    return read(call)


def _read(call):
    query, key, value, mask, screen, tolerance = (
        call.query,
        call.key,
        call.value,
        call.mask,
        call.screen,
        call.tolerance,
    )
    screened = screen is not None and screen.possible
    if not screened and key.dtype not in (torch.float32, torch.float64):
        return sdpa.forward(call)
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    everyone = [(batch, head) for batch in range(query.shape[0]) for head in range(heads)]
    tried = [who for who in everyone if not screened or screen.worth_trying(*who)]
    if not tried:
        screen.count({})
        return sdpa.forward(call)
    wide = query.double()
    scaled = wide * call.scale if call.multiplier is None else wide * (call.multiplier * call.scale).double()[..., None]
    rows = scaled.unflatten(1, (heads, groups)).flatten(2, 3)
    seen = _visible(mask, call.is_causal, query, key.shape[2])
    seen = None if seen is None else seen.unflatten(1, (heads, groups)).flatten(2, 3)
    if not screened:
        output, found = _skip_values(everyone, rows, key, value, seen, tolerance)
        if screen is not None:
            screen.count(found)
        return output.view(*query.shape[:3], -1)
    screen.ready()  # rounds the keys that came while no head was tried
    found = _keys_that_matter(screen, tried, rows, seen, tolerance)
    screen.count(found)
    flat = [who for who in everyone if who not in found]
    if not found:
        return sdpa.forward(call)
    output = _attend(rows, key, value, seen, found).to(query.dtype).view(*query.shape[:3], -1)
    m = None if call.multiplier is None else call.multiplier.expand(query.shape[:3])
    for batch, first, last in _runs(flat):
        ours, mine = (batch, slice(first, last)), (batch, slice(first * groups, last * groups))
        masked = None if mask is None else mask.expand(*query.shape[:2], -1, -1)[mine]
        part = call._replace(query=query[mine], key=key[ours], value=value[ours], mask=masked)
        output[mine] = sdpa.forward(part if m is None else part._replace(multiplier=m[mine]))
    return output


def _visible(mask, is_causal, query, num_keys):
    """Return which keys each query sees, (B, H, N, S), bool; None if every query sees every key."""
    num_queries = query.shape[2]
    if is_causal and num_queries > 1:
        causal = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        mask = causal[None, None] if mask is None else mask & causal
    return None if mask is None else mask.expand(*query.shape[:3], num_keys)


def _keys_that_matter(screen, tried, rows, seen, tolerance):
    """Return the keys to read, by head. Flat heads are missing."""
    heads = np.array(tried)
    mine, visible = (None if x is None else torch.from_numpy(x.numpy()[heads[:, 0], heads[:, 1]]) for x in (rows, seen))
    found = screen.candidates(mine, heads, visible, tolerance, MOST_KEPT)
    for who, keys in zip(tried, found, strict=True):
        screen.remember(*who, paid=keys is not None)
    return {who: keys for who, keys in zip(tried, found, strict=True) if keys is not None}


def _skip_values(everyone, rows, key, value, seen, tolerance):
    """Compute all scores; return the output (B, K, R, V), from the values that matter, and their indices by head.

    The scores are in the keys' dtype, with its rounding, as in any kernel.
    """
    scores = rows.to(key.dtype) @ key.mT
    if seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    weights = scores.softmax(-1) if seen is None else _softmax(scores)
    needed = weights.amax(2) > tolerance / key.shape[2]
    few = needed.sum(-1, keepdim=True) <= MOST_KEPT * key.shape[2]
    if not few.any():
        return weights @ value, {}
    index, kept = (needed & few).flatten(0, 1).nonzero().numpy().T
    stops = np.bincount(index, minlength=len(everyone)).cumsum()
    found = {who: keys for who, keys in zip(everyone, np.split(kept, stops[:-1]), strict=True) if len(keys)}
    output = _attend(rows, key, value, seen, found).to(value.dtype)
    for who in everyone:
        if who not in found:
            output[who] = weights[who] @ value[who]
    return output, found


@np.errstate(all="ignore")  # inputs that are not finite give outputs that are not, as in any kernel
def _attend(rows, key, value, seen, found):
    """Return attention over the keys found, (B, K, R, V), float64, and zeros for other heads."""
    output = rows.new_zeros(*rows.shape[:3], value.shape[-1])
    for who in found:
        if len(found[who]) > FEW:
            output[who] = _attend_many(rows[who], key[who], value[who], None if seen is None else seen[who], found[who])
    few = [who for who in found if len(found[who]) <= FEW]
    if not few:
        return output
    # Shorter heads repeat their keys, and the copies are hidden.
    counts = np.array([len(found[who]) for who in few])
    place = np.arange(counts.max())
    kept = np.array([np.resize(found[who], len(place)) for who in few])
    batch, head = np.array(few).T
    at = batch[:, None], head[:, None], kept
    scores = rows.numpy()[batch, head] @ _gather(key, at).swapaxes(1, 2)
    hidden = (place >= counts[:, None])[:, None]
    if seen is not None:
        hidden = hidden | ~seen.mT.numpy()[at].swapaxes(1, 2)
    np.copyto(scores, -np.inf, where=hidden)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    values = _gather(value, at)
    values[place >= counts[:, None]] = 0.0  # 0 * inf is NaN
    outputs = weights @ values / weights.sum(-1, keepdims=True)
    np.copyto(outputs, 0.0, where=top == -np.inf)  # a row that sees nothing
    output.numpy()[batch, head] = outputs
    return output


def _gather(tensor, at):
    """Return tensor[at] in float64. numpy takes rows in a third of torch's time, but has no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return torch.from_numpy(tensor.detach().view(torch.int16).numpy()[at]).view(torch.bfloat16).double().numpy()
    return tensor.detach().numpy()[at].astype(np.float64)


def _attend_many(rows, key, value, seen, kept):
    """Return attention of one head over the keys kept, read in parts."""
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    kept = torch.from_numpy(kept)
    parts = kept.split(PART)
    scores = torch.cat([rows @ key.index_select(0, part).double().T for part in parts], -1)
    if seen is not None:
        scores.masked_fill_(~seen.index_select(1, kept), -torch.inf)
    weights = _softmax(scores).to(wide)
    output = weights.new_zeros(weights.shape[0], value.shape[-1])
    for part, mine in zip(parts, weights.split(PART, -1), strict=True):
        output.addmm_(mine, value.index_select(0, part).to(wide))
    return output


def _softmax(scores):
    """Return the softmax, with zeros for a row that sees no key. NaN stays NaN."""
    return scores.softmax(-1).masked_fill_((scores == -torch.inf).all(-1, keepdim=True), 0.0)


def _runs(flat):
    """Return runs of neighbouring heads as (batch, first, last), so that each run is one call of the kernel."""
    runs = []
    for batch, head in flat:
        if runs and runs[-1][0].start == batch and runs[-1][2] == head:
            runs[-1] = (runs[-1][0], runs[-1][1], head + 1)
        else:
            runs.append((slice(batch, batch + 1), head, head + 1))
    return runs
