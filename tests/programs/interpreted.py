"""impl="triton" under Triton's interpreter, run by test_triton.py in a process of its own: TRITON_INTERPRET=1 pytest FILE."""

import math
import os

import numpy as np
import oracle
import pytest
import rounding
import torch

from ssmax import attention
from ssmax.backends import triton as host
from ssmax.backends import triton_kernels as kernels

assert os.environ["TRITON_INTERPRET"] == "1"
NAMES = rounding.NAMES


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 rows and 32 keys, so that a hundred tokens cross many of them."""
    tile = {"BLOCK_M": 16, "BLOCK_N": 32}
    monkeypatch.setattr(host, "tiles", lambda size, dtype: dict.fromkeys(("forward", "query", "key"), tile))


def tensors(rows=75, keys=75, heads=2, key_heads=1, size=16, value_size=16, batch=2, dtype=torch.float32):
    """Inputs that the dtype can hold, in float64, and what comes back into the backward."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, rows, size), (key_heads, keys, size), (key_heads, keys, value_size), (heads, rows, value_size)]
    tensors = [torch.randn(batch, *shape, generator=generator).to(dtype).double() for shape in shapes]
    s, b = torch.rand(heads, generator=generator) + 0.2, torch.rand(heads, generator=generator) - 0.5
    return [*tensors[:3], s.double(), b.double()], tensors[3]


def run(inputs, upstream, impl, dtype, **options):
    """Output and the gradients of q, k, v, s and b, in float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.to(wide if x.ndim == 1 else dtype).requires_grad_() for x in inputs]
    output = attention(*leaves, impl=impl, enable_gqa=True, **options)
    gradients = torch.autograd.grad(output, leaves, upstream.to(dtype))
    return [x.detach().double() for x in (output, *gradients)]


def visible(rows, keys, is_causal=False, window=None, cu_seqlens=None, n=None):
    table = oracle.causal(rows, keys, window) if is_causal else np.ones((rows, keys), dtype=bool)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        together = np.zeros_like(table)
        together[: sum(lengths), : sum(lengths)] = oracle.documents(lengths, causal_inside=False)
        table &= together
    return torch.tensor(table)


def compare(inputs, upstream, **options):
    """Assert that float32 is as near to float64 as its rounding allows, entry by entry."""
    exact = run(inputs, upstream, "reference", torch.float64, **options)
    got = run(inputs, upstream, "triton", torch.float32, **options)
    table = visible(inputs[0].shape[2], inputs[1].shape[2], **options)
    bounds = rounding.attention(*inputs, table, upstream, n=options.get("n"), centred=True)
    for name, truth, mine in zip(NAMES, exact, got, strict=True):
        assert truth.abs().max() > 1e-3 or options.get("window") == 1, (
            name
        )  # one key: its weight is 1, whatever q and k are
        rounding.assert_within(mine, truth, bounds[name], name)
    return got


LAYOUTS = {
    "bidirectional": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "window": ({}, {"is_causal": True, "window": 9}),
    "window of 1": ({}, {"is_causal": True, "window": 1}),
    "wide window": ({}, {"is_causal": True, "window": 10**12}),
    "one query": ({"rows": 1}, {"is_causal": True}),
    "fewer queries": ({"rows": 37}, {"is_causal": True, "window": 40}),
    "more queries, rows with n = 0": ({"rows": 75, "keys": 40}, {"is_causal": True}),
    "cross attention": ({"rows": 20, "keys": 33, "heads": 4, "key_heads": 4}, {}),
    "explicit n": ({"batch": 1}, {"n": torch.arange(75) % 7}),
    "values of another size": ({"size": 32, "value_size": 64}, {"is_causal": True}),
    "four queries to a key": ({"heads": 8, "key_heads": 2, "rows": 33, "keys": 33}, {"is_causal": True}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients(layout):
    shape, options = LAYOUTS[layout]
    inputs, upstream = tensors(**shape)
    got = compare(inputs, upstream, **options)
    dead = 75 - 40 if "n = 0" in layout else 0
    assert got[0][:, :, :dead].eq(0).all()
    assert got[1][:, :, :dead].eq(0).all()


@pytest.mark.parametrize("options", [{"is_causal": True}, {"is_causal": True, "window": 9}, {}], ids=str)
def test_packed_documents_and_padding_that_holds_anything(options):
    inputs, upstream = tensors(batch=1, rows=101, keys=101)
    options |= {"cu_seqlens": torch.tensor([0, 0, 37, 37, 38, 90])}
    clean = compare(inputs, upstream, **options)
    poisoned = [x.clone() for x in inputs]
    for x in poisoned[:3]:
        x[:, :, 90:] = math.nan
    for name, mine, want in zip(NAMES, run(poisoned, upstream, "triton", torch.float32, **options), clean, strict=True):
        assert torch.equal(mine, want), name
    assert clean[0][:, :, 90:].eq(0).all()


@pytest.mark.parametrize("size", [64, 128])
def test_the_tiles_of_a_gpu(size, monkeypatch):
    monkeypatch.undo()
    inputs, upstream = tensors(rows=201, keys=201, size=size, value_size=size, batch=1)
    compare(inputs, upstream, is_causal=True)


def test_a_negative_multiplier_and_large_logits():
    """The largest scaled logit is then the smallest logit; exponents taken from the other end would overflow."""
    inputs, upstream = tensors()
    inputs[0] *= 40
    inputs[3], inputs[4] = torch.tensor([-0.9, 0.9]).double(), torch.tensor([-3.0, 0.1]).double()
    compare(inputs, upstream, is_causal=True)


def poisoned(x):
    """The same numbers in the midst of NaN: transposed memory, and NaN behind every end."""
    batch, heads, length, size = x.shape
    memory = torch.full((batch + 1, length + 50, heads + 2, size + 16), math.nan, dtype=x.dtype)
    view = memory[:batch, 3 : 3 + length, 1 : 1 + heads, 8 : 8 + size].transpose(1, 2)
    view.copy_(x)
    return view


def test_strides_and_memory_that_must_not_be_read():
    inputs, upstream = tensors()
    plain = [x.float() for x in inputs]
    want = run(plain, upstream, "triton", torch.float32, is_causal=True)
    leaves = [(poisoned(x) if x.ndim == 4 else x).requires_grad_() for x in plain]
    output = attention(*leaves, impl="triton", is_causal=True, enable_gqa=True)
    got = [output, *torch.autograd.grad(output, leaves, poisoned(upstream.float()))]
    for name, mine, truth in zip(NAMES, got, want, strict=True):
        assert torch.equal(mine.double(), truth), name


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of the interpreter's maximum
@pytest.mark.parametrize(
    "options", [{"window": 20}, {"cu_seqlens": torch.tensor([0, 100, 160])}], ids=["window", "packed"]
)
def test_keys_far_outside_are_never_read(options):
    """0 x NaN is NaN: a loop over all keys would show it."""
    inputs, upstream = tensors(batch=1, rows=160, keys=160)
    far = 64 if "window" in options else 90
    seeing = 128 if "window" in options else 112  # rows whose tile sees none of the poisoned keys' tiles
    for x in inputs[1:3]:
        x[:, :, :far] = math.nan
    output, dq, dk, dv, _, _ = run(inputs, upstream, "triton", torch.float32, is_causal=True, **options)
    assert output[:, :, seeing:].isfinite().all()
    assert dq[:, :, seeing:].isfinite().all()
    assert output[:, :, :far].isnan().all()
    # And the other way: rows that see none of these keys.
    inputs, upstream = tensors(batch=1, rows=160, keys=160)
    inputs[0][:, :, 112:] = math.nan
    _, dq, dk, dv, _, _ = run(inputs, upstream, "triton", torch.float32, is_causal=True, **options)
    hidden = 64 if "window" in options else 96
    for gradient in (dk[:, :, :hidden], dv[:, :, :hidden], dq[:, :, :hidden]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "options", [{"window": 20}, {"cu_seqlens": torch.arange(0, 257, 32)}], ids=["window", "packed"]
)
def test_tiles_outside_are_skipped(options, monkeypatch):
    """Twice the tokens are twice the tiles: forward, rows and keys; four times would be all of them."""
    loads = {"total": 0}

    def counted(*arguments):
        loads["total"] += 1
        return original(*arguments)

    original = kernels.load_rows
    monkeypatch.setattr(kernels, "load_rows", counted)
    tiles = {}
    for rows in (128, 256):
        inputs, upstream = tensors(batch=1, heads=1, rows=rows, keys=rows)
        cut = {name: x if name == "window" else x[x <= rows] for name, x in options.items()}
        loads["total"] = 0
        run(inputs, upstream, "triton", torch.float32, is_causal=True, **cut)
        tiles[rows] = loads["total"]
    assert 1.9 * tiles[128] < tiles[256] < 2.2 * tiles[128]


def test_a_nan_that_is_seen_surfaces():
    inputs, upstream = tensors()
    inputs[1][:, :, 40] = math.nan
    output = run(inputs, upstream, "triton", torch.float32, is_causal=True)[0]
    assert output[:, :, 40:].isnan().all()
    assert output[:, :, :32].isfinite().all()  # its tile is the one from 32 on


def budget(inputs, upstream, table, unit):
    """What one rounding of P, dS, O and each result may add to the exact value, entry by entry, in float64."""
    q, k, v, s, b = inputs
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
    m = (s[:, None] * table.sum(-1).clamp(min=1).log() + b[:, None])[None, ..., None] / math.sqrt(q.shape[-1])
    p = (m * (q @ keys.mT)).masked_fill(~table, -math.inf).softmax(-1)
    output, small = p @ values, unit * torch.finfo(torch.float16).smallest_normal  # below: absolute rounding
    of_output = (unit * p + small) @ values.abs() + unit * output.abs() + small
    dp = upstream @ values.mT
    ds = p * (dp - (upstream * output).sum(-1, keepdim=True))
    wrong = p * (upstream.abs() * of_output).sum(-1, keepdim=True)
    rounded_ds = unit * (ds.abs() + wrong) + small + wrong
    rounded_mds = m.abs() * wrong + unit * m.abs() * (ds.abs() + wrong) + small
    ungroup = lambda x: x.unflatten(1, (k.shape[1], groups)).sum(2)  # noqa: E731
    dq, dk, dv = m * (ds @ keys), ungroup((m * ds).mT @ q), ungroup(p.mT @ upstream)
    return [
        of_output,
        m.abs() * (rounded_ds @ keys.abs()) + unit * dq.abs() + small,
        ungroup(rounded_mds.mT @ q.abs()) + unit * dk.abs() + small,
        ungroup((unit * p + small).mT @ upstream.abs()) + unit * dv.abs() + small,
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_stay_within_their_rounding(dtype):
    """bfloat16 is computed in float32 here, the interpreter's own being wrong: only its results are rounded."""
    inputs, upstream = tensors(rows=101, keys=101, dtype=dtype)
    inputs[0] = (3 * inputs[0]).to(dtype).double()
    exact = run(inputs, upstream, "reference", torch.float64, is_causal=True)
    got = run(inputs, upstream, "triton", dtype, is_causal=True)
    table = visible(101, 101, is_causal=True)
    own = rounding.attention(*inputs, table, upstream)  # of float32, in which it is summed
    bounds = budget(inputs, upstream, table, rounding.unit(dtype))
    for name, truth, mine, bound in zip(NAMES, exact, got, bounds, strict=False):
        rounding.assert_within(mine, truth, bound + own[name], name)
        assert (mine - truth).abs().max() > 0, name
    # <dO, O>, whose rounding is large, does not reach s and b.
    centred, uncentred = (rounding.attention(*inputs, table, upstream, stored=dtype, centred=x) for x in (True, False))
    for name, truth, mine in zip(NAMES[4:], exact[4:], got[4:], strict=True):
        rounding.assert_within(mine, truth, centred[name], name)
        assert (10 * centred[name] < uncentred[name]).all()
