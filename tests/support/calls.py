"""Random calls of visible_keys, attention and scalable_softmax, right ones and broken ones, and what each must give.

A right call must equal the oracle in shape, dtype and values. A broken one must raise ValueError or TypeError and name an
argument; where it is answered all the same, the answer must be the oracle's for the arguments as they stand.
"""

import inspect
import math
import re
import sys

import numpy as np
import oracle
import torch

import ssmax

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
JUNK = (None, "3", -1, 0, 1.5, True, math.nan, math.inf, [2], np.int64(-4), 2**70, torch.tensor(2), torch.ones(9, 9))


class Wrong(AssertionError):
    """A call that was answered wrongly, refused without a name, or refused though it was right."""


def random_call(rng):
    """Return (function's name, arguments, whether it is right)."""
    name = rng.choice(["visible_keys", "attention", "scalable_softmax"])
    arguments = {"visible_keys": _visible, "attention": _attention, "scalable_softmax": _softmax}[name](rng)
    right = bool(rng.random() < 0.6)
    if not right:
        for _ in range(rng.integers(1, 3)):
            _break(name, arguments, rng)
    return name, arguments, right


def judge(name, arguments, right):
    """Return "equal", "shape" (on the meta device, where there are no values) or "refused"; raise Wrong otherwise."""
    function = getattr(ssmax, name)
    try:
        got = function(**arguments)
    except (ValueError, TypeError) as error:
        names = inspect.signature(function).parameters
        if right:
            raise Wrong(f"a right call was refused: {error}") from error
        if not any(re.search(rf"\b{re.escape(word)}\b", str(error)) for word in names):
            raise Wrong(f"the refusal names no argument: {type(error).__name__}: {error}") from error
        return "refused"
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {error}") from error
    want, dtype, tolerance = {"visible_keys": _want_n, "attention": _want_output, "scalable_softmax": _want_weights}[
        name
    ](arguments)
    if tuple(got.shape) != want.shape or got.dtype != dtype:
        raise Wrong(f"{got.dtype} {tuple(got.shape)}, not {dtype} {want.shape}")
    if got.device.type == "meta":
        return "shape"
    found = got.double().numpy()
    with np.errstate(invalid="ignore"):
        near = (np.abs(found - want) <= tolerance) | (found == want) | (np.isnan(found) & np.isnan(want))
    if not near.all():
        raise Wrong(f"{found[~near][0]:.6g}, not {want[~near][0]:.6g} (allowed {tolerance:.3g})")
    return "equal"


def told(name, arguments):
    """Write a call so that it can be read."""

    def word(x):
        return f"{x.dtype} {tuple(x.shape)} {x.device}" if isinstance(x, torch.Tensor) else repr(x)

    return f"{name}({', '.join(f'{k}={word(x)}' for k, x in arguments.items())})"


# ---- right calls ----


def _maybe(rng, value, share=0.5):
    return value if rng.random() < share else None


def _whole(rng, low, high):
    number = int(rng.integers(low, high))
    return np.int64(number) if rng.random() < 0.2 else number


def _visible(rng):
    source = rng.choice(["num_keys", "padding", "full", "position_ids", "cu_seqlens"])
    causal = bool(rng.random() < 0.7) or source == "position_ids"
    window = _maybe(rng, _whole(rng, 1, 9)) if causal else None
    chunk = _maybe(rng, _whole(rng, 1, 5), 0.3)
    arguments = {"causal": causal, "window": window, "chunk": chunk}
    keys = int(rng.integers(1, 9))
    if source == "num_keys":
        arguments |= {"num_keys": np.int64(keys) if rng.random() < 0.2 else keys}
    elif source == "padding":
        arguments |= {"mask": _as_mask(rng, rng.random((int(rng.integers(1, 4)), keys)) < 0.7)}
    elif source == "full":
        rows, heads = int(rng.integers(1, keys + 1)), int(rng.choice([1, 3]))
        seen = rng.random((2, heads, rows, keys)) < 0.6
        if window is not None:  # which is defined for causal visibility alone
            seen &= oracle.causal(rows, keys)
        return arguments | {"mask": _as_mask(rng, seen)}
    elif source == "position_ids":
        position = torch.tensor(rng.integers(0, 20, (2, keys))).to(rng.choice([torch.int64, torch.int32]))
        arguments |= {"position_ids": position[0] if rng.random() < 0.3 else position}
    else:
        lengths = rng.integers(0, 5, int(rng.integers(1, 5)))
        offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        more = int(lengths.sum()) + int(rng.integers(0, 3))
        return arguments | {"cu_seqlens": offsets, "num_queries": _maybe(rng, more) if more else None}
    arguments["num_queries"] = _maybe(rng, _whole(rng, 1, keys + 1))
    return arguments


def _as_mask(rng, seen):
    kind = rng.choice(["bool", "integer", "minus infinity", "minimum"])
    seen = torch.tensor(seen)
    if kind == "bool":
        return seen
    if kind == "integer":
        return seen.to(rng.choice([torch.int64, torch.uint8]))
    dtype = rng.choice(DTYPES)
    hidden = -math.inf if kind == "minus infinity" else torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, hidden)


def _normal(rng, shape, dtype):
    flipped = rng.random() < 0.2 and len(shape) > 1
    x = torch.tensor(rng.standard_normal(shape[::-1] if flipped else shape)).to(dtype)
    return x.permute(*reversed(range(x.ndim))) if flipped else x  # strides of another layout


def _attention(rng):
    dtype = rng.choice(DTYPES)
    batch, size, width = (int(rng.integers(1, high)) for high in (3, 6, 5))
    rows, keys = (int(x) for x in rng.integers(0 if rng.random() < 0.1 else 1, 8, 2))
    heads, groups = int(rng.choice([1, 2, 4])), int(rng.choice([1, 2]))
    groups = groups if heads % groups == 0 else 1
    inner = heads // groups
    arguments = {
        "query": _normal(rng, (batch, heads, rows, size), dtype),
        "key": _normal(rng, (batch, inner, keys, size), dtype),
        "value": _normal(rng, (batch, inner, keys, width), dtype),
        "s": _factor(rng, heads),
        "b": _maybe(rng, _factor(rng, heads)),
        "is_causal": bool(rng.random() < 0.5),
        "scale": _maybe(rng, float(rng.uniform(0.1, 1)), 0.3),
        "enable_gqa": groups > 1 or bool(rng.random() < 0.5),
        "impl": str(rng.choice(["auto", "reference", "sdpa", "flex"], p=[0.3, 0.3, 0.3, 0.1])),  # flex takes long
    }
    if arguments["is_causal"]:
        arguments["window"] = _maybe(rng, _whole(rng, 1, 9), 0.4)
    if arguments["impl"] != "sdpa":
        arguments["softcap"] = _maybe(rng, float(rng.uniform(1, 30)), 0.3)
    if rng.random() < 0.5:
        shapes = [
            (batch, heads, rows, keys),
            (1, 1, rows, keys),
            (rows, keys),
            (batch, 1, 1, keys),
            (keys,),
            (heads, 1, 1),
        ]
        seen = torch.tensor(rng.random(shapes[rng.integers(len(shapes))]) < 0.6)
        arguments["attn_mask"] = (
            seen if rng.random() < 0.6 else torch.where(seen, 0.0, -math.inf).to(rng.choice(DTYPES))
        )
    if rng.random() < 0.3:
        shapes = [(), (rows,), (batch, rows), (1, rows), (batch, heads, rows), (batch, 1, rows)]
        n = torch.tensor(rng.integers(0, 12, shapes[rng.integers(len(shapes))]))
        arguments["n"] = int(rng.integers(0, 12)) if rng.random() < 0.3 else n.double() if rng.random() < 0.2 else n
        mask = arguments.get("attn_mask")
        if mask is not None and mask.is_floating_point():  # now it is a bias, which has the query's dtype
            arguments["attn_mask"] = mask.to(dtype) + (mask.isfinite() * 0.5).to(dtype)
    if rng.random() < 0.1:
        arguments = {k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
        arguments["impl"] = str(rng.choice(["reference", "sdpa"])) if arguments.get("softcap") is None else "reference"
    return arguments


def _factor(rng, heads):
    shape = [(), (1,), (heads,)][rng.integers(3)]
    value = rng.uniform(-0.5, 1.5, shape)
    if shape == () and rng.random() < 0.5:
        return float(value)
    return torch.tensor(value).to(rng.choice([torch.float64, torch.float32, torch.bfloat16]))


def _softmax(rng):
    shape = tuple(int(x) for x in rng.integers(1, 6, int(rng.integers(1, 4))))
    dim = int(rng.integers(-len(shape), len(shape)))
    row = list(shape)
    row[dim] = 1
    z = _normal(rng, shape, rng.choice(DTYPES)) * 3
    if rng.random() < 0.3:
        z = z.masked_fill(torch.tensor(rng.random(shape) < 0.4), -math.inf)
    arguments = {"z": z, "dim": dim}
    lowest = 0.0 if z.isinf().any() else -0.5  # a negative multiplier makes a hidden key infinitely large
    for name in ("s", "b"):
        if rng.random() < 0.7:
            number = rng.uniform(lowest, 1.5, [(), tuple(row)][rng.integers(2)])
            arguments[name] = float(number) if number.ndim == 0 else torch.tensor(number)
    if rng.random() < 0.4:
        n = rng.integers(0, 9, [(), tuple(row)][rng.integers(2)])
        arguments["n"] = int(n) if n.ndim == 0 else torch.tensor(n)
    if rng.random() < 0.5:
        arguments["mask"] = torch.tensor(rng.random(shape[rng.integers(len(shape)) :]) < 0.6)
    if rng.random() < 0.05:
        arguments = {k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
    return arguments


# ---- broken calls ----


def _break(name, arguments, rng):
    """Put junk in the place of an argument, or bend a tensor's shape, dtype, values or device."""
    names = [*inspect.signature(getattr(ssmax, name)).parameters]
    key = names[rng.integers(len(names))]
    value = arguments.get(key)
    if not isinstance(value, torch.Tensor) or rng.random() < 0.3:
        arguments[key] = JUNK[rng.integers(len(JUNK))]
        return
    bends = [
        lambda x: x[None],
        lambda x: x.reshape(-1),
        lambda x: torch.cat([x, x], -1) if x.ndim else x,
        lambda x: x[..., :0] if x.ndim else x,
        lambda x: x.to(torch.int64) if x.device.type != "meta" else x,
        lambda x: x.to(torch.complex64),
        lambda x: x.float(),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.to("meta"),
        lambda x: -x if x.dtype != torch.bool else ~x,
        lambda x: x.to_sparse() if x.layout == torch.strided and x.device.type != "meta" else x,
        lambda x: x.numpy() if x.dtype not in (torch.bfloat16,) and x.device.type != "meta" else x,
    ]
    try:
        arguments[key] = bends[rng.integers(len(bends))](value)
    except (RuntimeError, TypeError, NotImplementedError):  # torch itself cannot bend it so
        arguments[key] = "bent"


# ---- what a call must give ----


def _numbers(x):
    if isinstance(x, torch.Tensor):
        return np.ones(tuple(x.shape)) if x.device.type == "meta" else x.detach().to(torch.float64).numpy()
    return np.asarray(x, dtype=np.float64)


def _open(mask):
    x = _numbers(mask)
    if mask.is_floating_point():
        return x > torch.finfo(mask.dtype).min / 2
    return x != 0


def _want_n(a):
    causal, window, chunk, asked = a.get("causal", True), a.get("window"), a.get("chunk"), a.get("num_queries")
    if a.get("position_ids") is not None:
        position = np.atleast_2d(_numbers(a["position_ids"]).astype(int))
        position = position[:, -asked:] if asked is not None else position
        first = position // chunk * chunk if chunk else np.zeros_like(position)
        first = np.maximum(first, position - window + 1) if window else first
        return (position + 1 - first).astype(float), torch.int64, 0
    if a.get("cu_seqlens") is not None:
        lengths = np.diff(_numbers(a["cu_seqlens"])).astype(int)
        total = int(lengths.sum())
        n = oracle.documents(lengths, causal, window, chunk).sum(-1)
        asked = total if asked is None else asked
        n = np.concatenate([n, np.zeros(max(0, asked - total))])[max(0, total - asked) :]
        return n[None].astype(float), torch.int64, 0
    plain = a.get("num_keys") is not None
    real = np.ones((1, int(a["num_keys"])), dtype=bool) if plain else _open(a["mask"])
    keys = real.shape[-1]
    if real.ndim == 4:
        table = real & oracle.documents([keys], False, None, chunk)[keys - real.shape[2] :]
        if window is not None:
            table = table & oracle.causal(real.shape[2], keys, window)
        n = table.sum(-1)
        return (n[:, 0] if n.shape[1] == 1 else n).astype(float), torch.int64, 0
    rows = keys if asked is None else int(asked)
    if not causal and chunk is None:
        return np.repeat(real.sum(1, keepdims=True), rows, 1).astype(float), torch.int64, 0
    n = np.zeros((len(real), rows))
    for i, row in enumerate(real):
        start = int(np.argmax(row)) if row.any() else 0  # chunks begin with the text
        for r in range(rows):
            p = keys - rows + r
            for j in range(keys):
                together = chunk is None or (p - start) // chunk == (j - start) // chunk
                n[i, r] += row[j] and (j <= p or not causal) and (window is None or p - j < window) and together
    return n, torch.int64, 0


def _want_output(a):
    q, k, v = (_numbers(a[name]) for name in ("query", "key", "value"))
    batch, heads, rows, size = q.shape
    keys, mask, bias = k.shape[2], a.get("attn_mask"), 0.0
    seen = np.ones((batch, heads, rows, keys), dtype=bool)
    if a.get("is_causal"):
        seen = seen & oracle.causal(rows, keys, a.get("window"))
    if mask is not None:
        seen = seen & np.broadcast_to(_open(mask), seen.shape)
        if a.get("n") is not None and mask.is_floating_point():
            bias = np.where(_open(mask), _numbers(mask), 0.0)
    n = a.get("n")
    if n is not None:
        n = _numbers(n)
        n = np.broadcast_to(n[:, None] if n.ndim == 2 else n, (batch, heads, rows))
    s, b = (np.broadcast_to(_numbers(0.0 if a.get(x) is None else a[x]).reshape(-1), (heads,)) for x in "sb")
    scale = size**-0.5 if a.get("scale") is None else a["scale"]
    want = oracle.attention(q, k, v, s, b, seen, n, scale, a.get("softcap"), bias=np.broadcast_to(bias, seen.shape))
    dtype = a["query"].dtype
    # First order: a rounding of the query moves a logit by eps of its terms' sum, that moves the output by as much of v.
    terms = (
        np.abs(q).max(initial=0)
        * np.abs(k).max(initial=0)
        * size
        * abs(scale)
        * (np.abs(s).max() * 3 + np.abs(b).max())
    )
    eps = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    if a.get("softcap") is not None or (mask is not None and mask.is_floating_point()):
        eps = max(eps, 1e-12)
    return want, dtype, 4 * eps * (1 + float(terms)) * (1 + float(np.abs(v).max(initial=0)))


def _want_weights(a):
    z, dim = _numbers(a["z"]), a.get("dim", -1)
    row = list(z.shape)
    row[dim] = 1
    seen = z > -np.inf
    if a.get("mask") is not None:
        seen = seen & np.broadcast_to(_numbers(a["mask"]) != 0, z.shape)
    n = seen.sum(dim, keepdims=True) if a.get("n") is None else np.broadcast_to(_numbers(a["n"]), row)
    s, b = (np.broadcast_to(_numbers(a.get(name, start)), row) for name, start in (("s", 1.0), ("b", 0.0)))
    m = s * np.log(np.maximum(n, 1)) + b
    flat = [np.moveaxis(x, dim, -1) for x in (z, seen, m, n)]
    want = np.zeros_like(flat[0])
    for at in np.ndindex(want.shape[:-1]):
        if flat[3][at][0] > 0:
            want[at] = oracle.softmax_row(flat[0][at], flat[2][at][0], flat[1][at])
    dtype = a["z"].dtype
    eps = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
    largest = np.abs(np.where(np.isfinite(z), z, 0)).max(initial=0) * np.abs(m).max(initial=0)
    return np.moveaxis(want, -1, dim), dtype, eps + 8 * max(1e-13, 1e-7 * (dtype != torch.float64)) * (1 + largest)


def main(count, seed):
    """Judge so many random calls; print the counts, and the first wrong one."""
    found = {}
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        name, arguments, right = random_call(rng)
        try:
            verdict = judge(name, arguments, right)
        except Wrong as wrong:
            print(f"call {i}: {told(name, arguments)}: {wrong}", flush=True)
            verdict = "wrong"
        found[verdict] = found.get(verdict, 0) + 1
        found[f"{name} {verdict}"] = found.get(f"{name} {verdict}", 0) + 1
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(found.items())))
    return found.get("wrong", 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])) > 0)
