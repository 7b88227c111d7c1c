"""Ground truth in plain Python and numpy float64, written from the formula and independent of the library."""

import itertools
import math

import numpy as np


def softmax_row(z, m, open_keys):
    """Weights of one row: softmax(m z) over the open keys, zeros elsewhere."""
    weights = np.zeros(len(z))
    seen = [j for j in range(len(z)) if open_keys[j]]
    if seen:
        top = max(m * z[j] for j in seen)
        total = sum(math.exp(m * z[j] - top) for j in seen)
        for j in seen:
            weights[j] = math.exp(m * z[j] - top) / total
    return weights


def attention(q, k, v, s, b, open_keys, n=None, scale=None, softcap=None, bias=None):
    """q (B, H, N, D), k and v (B, K, S, .), s and b (H,), open_keys (B, H, N, S) bool; n defaults to their count.

    bias: (B, H, N, S), added after the multiplier.
    """
    batch, heads, rows, size = q.shape
    groups = heads // k.shape[1]
    scale = 1 / math.sqrt(size) if scale is None else scale
    out = np.zeros((batch, heads, rows, v.shape[-1]))
    for i in range(batch):
        for h in range(heads):
            for r in range(rows):
                z = scale * (k[i, h // groups] @ q[i, h, r])
                if softcap is not None:
                    z = softcap * np.tanh(z / softcap)
                visible = open_keys[i, h, r]
                count = visible.sum() if n is None else n[i, h, r]
                if count > 0 and visible.any():
                    m = s[h] * math.log(max(count, 1)) + b[h]
                    weights = softmax_row(m * z + (0 if bias is None else bias[i, h, r]), 1.0, visible)
                    out[i, h, r] = weights @ v[i, h // groups]
    return out


def causal(rows, keys, window=None):
    """(N, S): the queries are the last N of S positions; a window counts the query itself."""
    table = np.zeros((rows, keys), dtype=bool)
    for r in range(rows):
        position = keys - rows + r
        for j in range(keys):
            table[r, j] = j <= position and (window is None or position - j < window)
    return table


def documents(lengths, causal_inside=True, window=None, chunk=None):
    """(T, T): which key each packed token sees."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = starts[-1]
    table = np.zeros((total, total), dtype=bool)
    for first, stop in itertools.pairwise(starts):
        for i in range(first, stop):
            for j in range(first, stop):
                near = window is None or i - j < window
                together = chunk is None or (i - first) // chunk == (j - first) // chunk
                table[i, j] = near and together and (j <= i or not causal_inside)
    return table
