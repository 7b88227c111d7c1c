import math

import numpy as np
import oracle
import pytest
import rounding
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmax import matched_scale, scalable_softmax, visible_keys

FIGURE_1 = {  # n: (softmax, SSMax) largest weight, all z = -2, the last +3, s = 0.43
    2: (0.99331, 0.81612),
    8: (0.95496, 0.92587),
    64: (0.70201, 0.99182),
    256: (0.36789, 0.99831),
    1024: (0.12670, 0.99966),
    4096: (0.03497, 0.99993),
    100_000: (0.00148, 1.0),
}
FIGURE_3 = {  # s (None = softmax): z_max of weight 1/2 among values evenly spread on [0, 1], n = 1e2 ... 1e5
    None: (5.137, 7.448, 9.752, 12.054),
    0.43: (2.902, 2.941, 2.973, 3.001),
    1.0: (1.667, 1.720, 1.759, 1.788),
    2.0: (1.262, 1.310, 1.342, 1.364),
}


@pytest.mark.parametrize(("n", "expected"), FIGURE_1.items())
def test_figure_1_of_the_paper(n, expected):
    z = torch.full((n,), -2.0)
    z[-1] = 3.0
    assert scalable_softmax(z, 0.0, 1.0)[-1].item() == pytest.approx(expected[0], abs=6e-6)
    assert scalable_softmax(z, 0.43)[-1].item() == pytest.approx(expected[1], abs=6e-6)


@pytest.mark.parametrize(("s", "crossings"), FIGURE_3.items())
@pytest.mark.parametrize("power", [2, 3, 4, 5])
def test_figure_3_of_the_paper(s, crossings, power):
    n, z_max = 10**power, crossings[power - 2]

    def weight(top):
        z = torch.cat([torch.linspace(0, 1, n - 1, dtype=torch.float64), torch.tensor([top], dtype=torch.float64)])
        return (z.softmax(0) if s is None else scalable_softmax(z, s))[-1].item()

    assert weight(z_max - 1e-3) < 0.5 < weight(z_max + 1e-3)


def test_matched_scale_is_the_papers():
    assert matched_scale(1024) == pytest.approx(0.16847, abs=5e-6)
    assert matched_scale(100) == pytest.approx(1 / np.mean(np.log(np.arange(1, 101))))
    with pytest.raises(ValueError, match="at least 2"):
        matched_scale(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s", [0.43, -0.5, 0.0])
def test_scalable_softmax_matches_the_oracle(dtype, s):
    torch.manual_seed(0)
    z = (3 * torch.randn(5, 7)).to(dtype)
    mask = torch.rand(5, 7) > 0.4
    mask[2] = False
    got = scalable_softmax(z, s, 0.2, mask=mask)
    want = np.stack(
        [
            oracle.softmax_row(row, s * math.log(max(1, seen.sum())) + 0.2, seen)
            for row, seen in zip(z.double().numpy(), mask.numpy(), strict=True)
        ]
    )
    assert got.dtype == dtype
    rounding.assert_within(got, want, rounding.softmax(z, s, 0.2, mask, dtype))
    assert (got[2] == 0).all()
    assert got[0].max() > 0


def test_minus_infinity_is_not_visible_whatever_s():
    z = torch.tensor([1.0, -math.inf, 2.0])
    for s in (0.5, 0.0, -0.5):
        expected = oracle.softmax_row([1.0, 0.0, 2.0], s * math.log(2), [True, False, True])
        np.testing.assert_allclose(scalable_softmax(z, s).numpy(), expected, atol=1e-6)


def test_extreme_logits_and_single_keys():
    assert scalable_softmax(torch.tensor([1e4, -1e4]), 1.0).tolist() == [1.0, 0.0]
    assert scalable_softmax(torch.tensor([[-7.0]]), 0.43).tolist() == [[1.0]]
    assert scalable_softmax(torch.randn(3, 4), 0.43, n=0).eq(0).all()
    assert scalable_softmax(torch.tensor([math.nan, 1.0])).isnan().all()


def test_explicit_n_and_dim():
    z = torch.randn(4, 3, dtype=torch.float64)
    n = torch.tensor([[5, 6, 7]])
    want = (0.3 * n.log() * z).softmax(0)
    torch.testing.assert_close(scalable_softmax(z, 0.3, n=n, dim=0), want, rtol=0, atol=1e-7)


def test_gradients_of_z_s_and_b_and_zeros_for_dead_rows():
    torch.manual_seed(1)
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    s, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.4, 0.3))
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda z, s, b: scalable_softmax(z, s, b, mask=mask), (z, s, b))
    scalable_softmax(z, s, b, mask=mask).square().sum().backward()
    assert z.grad[1].eq(0).all()
    assert z.grad[0].abs().max() > 0
    assert s.grad != 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"z": torch.arange(3)}, TypeError, "floating point"),
        ({"z": torch.ones(3), "mask": torch.ones(3)}, TypeError, "bool"),
        ({"z": torch.ones(2, 3), "mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask must broadcast"),
        ({"z": torch.ones(2, 3), "n": torch.ones(2, 3)}, ValueError, "n must broadcast"),
        ({"z": torch.ones(2, 3), "n": -1}, ValueError, "negative"),
        ({"z": [1.0, 2.0]}, TypeError, "z must be"),
        ({"z": torch.ones(2, 3), "dim": 2}, ValueError, "dim must be"),
        ({"z": torch.ones(2, 3), "s": "a"}, TypeError, "s must be"),
    ],
)
def test_bad_calls_of_scalable_softmax(arguments, error, words):
    with pytest.raises(error, match=words):
        scalable_softmax(**arguments)


def test_a_python_float_keeps_float64_exact():
    z = torch.tensor([0.0, 1.0], dtype=torch.float64)
    want = 1 / (1 + math.exp(-0.43 * math.log(2)))
    assert scalable_softmax(z, 0.43)[1].item() == pytest.approx(want, rel=1e-15)


def test_what_is_hidden_cannot_poison():
    z = torch.tensor([[1.0, math.nan, 2.0], [math.nan, math.nan, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    weights = scalable_softmax(z, 0.43, mask=mask)
    assert weights.isfinite().all()
    weights.square().sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", ["mask", "position_ids", "cu_seqlens"])
def test_lists_are_refused_by_name(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        visible_keys(**{name: [0, 1]})


# ---- visible_keys, against counting in a table ----

lengths = st.integers(1, 9)
narrowing = st.fixed_dictionaries({"window": st.none() | st.integers(1, 12), "chunk": st.none() | st.integers(1, 6)})


@given(keys=st.integers(1, 20), rows=st.integers(1, 20), narrow=narrowing)
def test_plain_sequences(keys, rows, narrow):
    rows = min(rows, keys)
    want = oracle.documents([keys], **narrow)[-rows:].sum(-1)
    assert visible_keys(num_keys=keys, num_queries=rows, **narrow).tolist() == [want.tolist()]


@given(keys=st.integers(1, 20), chunk=st.none() | st.integers(1, 6))
def test_bidirectional_sequences(keys, chunk):
    want = oracle.documents([keys], causal_inside=False, chunk=chunk).sum(-1)
    assert visible_keys(num_keys=keys, causal=False, chunk=chunk).tolist() == [want.tolist()]


@given(
    packed=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    tail=st.integers(0, 3),
    is_causal=st.booleans(),
    narrow=narrowing,
)
def test_packed_documents(packed, tail, is_causal, narrow):
    if not is_causal:
        narrow = narrow | {"window": None}
    total = sum(packed)
    want = oracle.documents(packed, is_causal, **narrow).sum(-1).tolist()
    offsets = torch.tensor([0, *np.cumsum(packed)], dtype=torch.int32)
    assert visible_keys(cu_seqlens=offsets, causal=is_causal, **narrow).tolist() == [want]
    if total + tail:
        got = visible_keys(cu_seqlens=offsets, num_queries=total + tail, causal=is_causal, **narrow)
        assert got.tolist() == [want + [0] * tail]
    if is_causal and total:
        positions = torch.tensor([i for length in packed for i in range(length)])
        assert visible_keys(position_ids=positions, **narrow).tolist() == [want]


@given(
    rows=st.integers(1, 8),
    data=st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 10),
    is_causal=st.booleans(),
)
def test_padding_masks(rows, data, window, is_causal):
    real = np.array(data)
    window = window if is_causal else None
    table = oracle.documents([8], is_causal, window)[-rows:]
    want = (table[None] & real[:, None, :]).sum(-1).tolist()
    minimum = torch.finfo(torch.float32).min
    for mask in (torch.tensor(real), torch.tensor(real).long(), torch.where(torch.tensor(real), 0.0, minimum)):
        assert visible_keys(mask=mask, num_queries=rows, window=window, causal=is_causal).tolist() == want


@settings(max_examples=30)
@given(heads=st.sampled_from([1, 3]), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_full_masks_count_their_rows(heads, rows, seed):
    rng = np.random.default_rng(seed)
    table = rng.random((2, heads, rows, 6)) > 0.5
    want = table.sum(-1)
    for mask in (torch.tensor(table), torch.where(torch.tensor(table), 0.0, -math.inf)):
        got = visible_keys(mask=mask)
        assert got.dtype == torch.int64
        assert got.tolist() == (want[:, 0] if heads == 1 else want).tolist()


@pytest.mark.parametrize("keys", [4000, 4093])
def test_large_masks_count_their_rows(keys):
    mask = torch.from_numpy(np.random.default_rng(keys).random((2, 3, 5, keys)) > 0.2)
    mask[:, 1] = True
    mask[:, 2, 3] = False
    for table in (mask, mask[:, :1].expand(2, 3, 5, keys), mask.transpose(0, 2)):
        assert visible_keys(mask=table).tolist() == table.numpy().sum(-1).tolist()


def test_left_padding_moves_chunks_with_the_text():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    assert visible_keys(mask=mask, chunk=2).tolist() == [[0, 0, 1, 2, 1, 2, 1]]


def test_global_positions_of_a_shard_and_of_a_million():
    positions = torch.tensor([[1_000_000, 1_000_001]])
    assert visible_keys(position_ids=positions).tolist() == [[1_000_001, 1_000_002]]
    assert visible_keys(position_ids=positions, window=4096).tolist() == [[4096, 4096]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one"),
        ({"num_queries": 3}, "exactly one"),
        ({"num_keys": 3, "mask": torch.ones(1, 3)}, "exactly one"),
        ({"num_keys": 3, "num_queries": 4}, "more than the 3"),
        ({"num_keys": -1}, "non-negative"),
        ({"num_keys": 3, "window": 0}, "positive integer"),
        ({"num_keys": 3, "window": 2, "causal": False}, "causal attention only"),
        ({"position_ids": torch.arange(3), "causal": False}, "how many follow"),
        ({"position_ids": torch.tensor([-1, 0])}, "negative"),
        ({"position_ids": torch.ones(3)}, "integers"),
        ({"position_ids": torch.ones(3, 1, 3).long()}, "integers of shape"),
        ({"cu_seqlens": torch.tensor([0, 4, 2])}, "never decrease"),
        ({"cu_seqlens": torch.tensor([1, 4])}, "start at 0"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "integers"),
        ({"mask": torch.full((1, 3), -1e4)}, "-10000"),
        ({"mask": torch.tensor([[1.0, 1.0]])}, "additive mask"),
        ({"mask": torch.tensor([[2, 1]])}, "0 and 1 only"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask must be"),
        ({"mask": torch.ones(1, 1, 3, 4, dtype=torch.bool), "window": 2}, "shows later keys"),
        ({"mask": torch.ones(1, 1, 2, 3, dtype=torch.bool), "num_queries": 3}, "2 query rows"),
    ],
)
def test_what_does_not_determine_n_raises(arguments, words):
    with pytest.raises(ValueError, match=words):
        visible_keys(**arguments)
