import math

import numpy as np
import oracle
import pytest
import rounding
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from ssmax import SSMaxScale, attention, visible_keys

IMPLS = ("reference", "sdpa", "flex")  # triton has other head sizes and an interpreter: test_triton.py
TRAINED = ("reference", "sdpa")  # FlexAttention has no backward on the CPU

B, H, N, S, D = 2, 4, 7, 7, 8


def tensors(rows=N, keys=S, heads=H, key_heads=H, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, heads, rows, D), (B, key_heads, keys, D), (B, key_heads, keys, D)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    s, b = (torch.rand(heads, generator=generator, dtype=torch.float64) + 0.2 for _ in range(2))
    return [x.to(dtype) for x in (q, k, v)], s, b


CAUSAL = torch.tensor(oracle.causal(N, S))


def multipliers(s, b):
    """Of N causal queries, (H, N)."""
    return s[:, None] * torch.arange(1, N + 1).double().log() + b[:, None]


def padding(side):
    real = torch.ones(B, S, dtype=torch.bool)
    real[0, :3] = side == "right"
    real[0, 3:] = side == "left"
    return real[:, None, None, :]


def scattered():
    mask = torch.rand(B, H, N, S, generator=torch.Generator().manual_seed(5)) > 0.5
    mask[0, 1, 2] = False
    return mask


# name: (arguments of attention, open keys as the oracle needs them)
LAYOUTS = {
    "bidirectional": ({}, np.ones((N, S), dtype=bool)),
    "causal": ({"is_causal": True}, oracle.causal(N, S)),
    "window": ({"is_causal": True, "window": 3}, oracle.causal(N, S, 3)),
    "wide window": ({"is_causal": True, "window": 99}, oracle.causal(N, S)),
    "left padding": ({"is_causal": True, "attn_mask": padding("left")}, oracle.causal(N, S) & padding("left").numpy()),
    "right padding": (
        {"is_causal": True, "attn_mask": padding("right")},
        oracle.causal(N, S) & padding("right").numpy(),
    ),
    "padding, window": (
        {"is_causal": True, "attn_mask": padding("left"), "window": 2},
        oracle.causal(N, S, 2) & padding("left").numpy(),
    ),
    "prefix-LM": (
        {"attn_mask": torch.tensor(oracle.causal(N, S)).index_fill(1, torch.arange(3), True)},
        torch.tensor(oracle.causal(N, S)).index_fill(1, torch.arange(3), True).numpy(),
    ),
    "packed": ({"attn_mask": torch.tensor(oracle.documents([3, 0, 4]))}, oracle.documents([3, 0, 4])),
    "per head, a dead row": ({"attn_mask": scattered()}, scattered().numpy()),
    "per head and causal": ({"attn_mask": scattered(), "is_causal": True}, scattered().numpy() & oracle.causal(N, S)),
    "additive": (
        {"attn_mask": torch.where(scattered(), 0.0, -math.inf).double()},
        scattered().numpy(),
    ),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_the_oracle(layout, impl):
    arguments, open_keys = LAYOUTS[layout]
    (q, k, v), s, b = tensors()
    want = oracle.attention(*(x.numpy() for x in (q, k, v, s, b)), np.broadcast_to(open_keys, (B, H, N, S)))
    got = attention(q, k, v, s, b, impl=impl, **arguments)
    assert abs(want).max() > 0.1
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)
    narrow = attention(q.float(), k.float(), v.float(), s, b, impl=impl, **_cast(arguments))
    bound = rounding.attention(q, k, v, s, b, torch.as_tensor(open_keys), folded=impl == "sdpa")
    rounding.assert_within(narrow, want, bound)


def _cast(arguments):
    mask = arguments.get("attn_mask")
    return arguments | {"attn_mask": mask.float()} if mask is not None and mask.is_floating_point() else arguments


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_gradients_equal_the_reference(layout):
    arguments, _ = LAYOUTS[layout]
    gradients = {}
    for impl in TRAINED:
        (q, k, v), s, b = tensors()
        leaves = [x.requires_grad_() for x in (q, k, v, s, b)]
        output = attention(*leaves, impl=impl, **arguments)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        gradients[impl] = torch.autograd.grad((output * weights).sum(), leaves)
    for reference, other in zip(gradients["reference"], gradients["sdpa"], strict=True):
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(other, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("impl", TRAINED)
def test_gradcheck(impl):
    (q, k, v), s, b = tensors(rows=3, keys=4)
    leaves = [x[:1].clone().requires_grad_() for x in (q, k, v)] + [s.requires_grad_(), b.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, is_causal=True, window=2, impl=impl), leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("rows", "keys", "window"), [(1, 9, None), (4, 9, None), (4, 9, 3), (9, 4, None), (9, 4, 2)])
def test_queries_are_the_last_positions(rows, keys, window, impl):
    (q, k, v), s, b = tensors(rows, keys)
    got = attention(q, k, v, s, b, is_causal=True, window=window, impl=impl)
    open_keys = np.broadcast_to(oracle.causal(rows, keys, window), (B, H, rows, keys))
    want = oracle.attention(*(x.numpy() for x in (q, k, v, s, b)), open_keys)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)
    assert (got[:, :, : max(0, rows - keys)] == 0).all()


@pytest.mark.parametrize("learned", ["q k v s b", "s", "k", ""])
@pytest.mark.parametrize(("rows", "keys", "window"), [(1100, 1300, None), (1100, 1300, 100), (1300, 1100, 700)])
def test_blocks_of_rows_join_without_a_seam_in_output_and_gradients(rows, keys, window, learned):
    (q, k, v), s, b = tensors(rows=rows, keys=keys, key_heads=2)
    inputs = dict(zip("qkvsb", (q, k, v, s, b), strict=True))
    upstream = torch.randn(B, H, rows, D, dtype=torch.float64)
    found = {}
    for impl in ("reference", "sdpa"):
        leaves = {name: x.clone().requires_grad_(name in learned.split()) for name, x in inputs.items()}
        output = attention(*leaves.values(), is_causal=True, window=window, enable_gqa=True, impl=impl)
        if learned:
            output.backward(upstream)
        found[impl] = [output.detach(), *(x.grad for x in leaves.values() if x.grad is not None)]
    assert len(found["sdpa"]) == 1 + len(learned.split())
    for got, want in zip(found["sdpa"], found["reference"], strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_decoding_with_a_cache_equals_one_pass():
    (q, k, v), s, b = tensors()
    whole = attention(q, k, v, s, b, is_causal=True)
    steps = [attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], s, b, is_causal=True) for i in range(N)]
    torch.testing.assert_close(torch.cat(steps, 2), whole, rtol=0, atol=1e-12)


def test_preallocated_keys_do_not_count():
    (q, k, v), s, b = tensors(rows=1)
    filled = torch.arange(S) < 5
    got = attention(q, k, v, s, b, attn_mask=filled)
    torch.testing.assert_close(got, attention(q, k[:, :, :5], v[:, :, :5], s, b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_grouped_heads(impl):
    (q, k, v), s, b = tensors(key_heads=2)
    got = attention(q, k, v, s, b, is_causal=True, enable_gqa=True, impl=impl)
    want = oracle.attention(*(x.numpy() for x in (q, k, v, s, b)), np.broadcast_to(oracle.causal(N, S), (B, H, N, S)))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_explicit_n_per_row_and_head(impl):
    (q, k, v), s, b = tensors()
    n = np.random.default_rng(0).integers(0, 50, (B, H, N))
    want = oracle.attention(*(x.numpy() for x in (q, k, v, s, b)), np.ones((B, H, N, S), dtype=bool), n)
    for shape in (np.s_[:], np.s_[:, 0], np.s_[0, 0]):
        given = n[shape]
        full = np.broadcast_to(given if given.ndim != 2 else given[:, None], (B, H, N))
        want = oracle.attention(*(x.numpy() for x in (q, k, v, s, b)), np.ones((B, H, N, S), dtype=bool), full)
        np.testing.assert_allclose(attention(q, k, v, s, b, n=torch.tensor(given), impl=impl).numpy(), want, atol=1e-12)
    assert (n == 0).any()


def test_a_bias_is_added_after_the_multiplier_and_needs_n():
    (q, k, v), s, b = tensors()
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.125]).double()
    distance = torch.arange(N)[:, None] - torch.arange(S)
    alibi = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf)
    with pytest.raises(ValueError, match="pass a bool mask, or n itself"):
        attention(q, k, v, s, b, attn_mask=alibi)
    n = visible_keys(num_keys=N)
    m = s[:, None] * n.double().log() + b[:, None]
    want = ((m[..., None] * (q @ k.mT) / math.sqrt(D)) + alibi).softmax(-1) @ v
    for impl in ("reference", "sdpa", "flex"):
        torch.testing.assert_close(attention(q, k, v, s, b, n=n, attn_mask=alibi, impl=impl), want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("impl", ["auto", "reference", "flex"])
def test_softcap_is_part_of_z(impl):
    torch.manual_seed(0)
    z = 6 * torch.randn(1, 1, 1, 4096)
    v = torch.eye(4096)[None, None]
    key = torch.eye(4096)[None, None]
    weights = attention(z, key, v, 0.43, softcap=30.0, scale=1.0, impl=impl)
    assert 0.8 < weights.max() < 0.97
    assert weights.max().item() == pytest.approx(
        (0.43 * math.log(4096) * 30 * torch.tanh(z / 30)).softmax(-1).max().item()
    )
    with pytest.raises(ValueError, match="no softcap"):
        attention(z, key, v, 0.43, softcap=30.0, impl="sdpa")


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 1.0), (torch.float16, 1 / 8)])
def test_the_query_is_rounded_once(dtype, share):
    """The scale that reaches the kernel's row, and each component of it, against float64."""
    query = torch.randn(1, 1, 20_000, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    n = torch.arange(2, 20_002)
    scaled, exact = SSMaxScale(1, s=0.43)(query, n).double()[0, 0], query.double()[0, 0]
    m = 0.43 * n.double().log()
    of_row = (scaled * exact).sum(-1) / exact.square().sum(-1) / m - 1
    assert of_row.square().mean().sqrt() < 6e-4 * share
    assert of_row.abs().max() < 2.5e-3 * share
    want = exact * m[:, None]
    normal = want.abs() > torch.finfo(dtype).tiny
    error = (scaled / want - 1)[normal]
    assert error.abs().max() < torch.finfo(dtype).eps / 2 * 1.01  # half a unit, and float32's own rounding


def test_fp16_products_near_1e5_stay_finite():
    q = torch.full((1, 1, 4, 64), 40.0, dtype=torch.float16)
    k = q * torch.linspace(0.9, 1.0, 4, dtype=torch.float16)[:, None]
    got = attention(q, k, q, 0.43, is_causal=True, impl="sdpa")
    want = attention(q.double(), k.double(), q.double(), 0.43, is_causal=True)
    assert got.isfinite().all()
    m = 0.43 * torch.arange(1, 5).double().log()
    rounding.assert_within(got, want, rounding.closed_form(q, k, q, m, CAUSAL[:4, :4], 64**-0.5, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_s_and_b_learn_in_any_dtype(dtype):
    (q, k, v), s, b = tensors(dtype=dtype)
    leaves = [x.float().requires_grad_() for x in (s, b)]
    attention(q, k, v, *leaves, is_causal=True).float().square().sum().backward()
    reference = [x.double().requires_grad_() for x in (s, b)]
    attention(
        q.double(), k.double(), v.double(), *reference, is_causal=True, impl="reference"
    ).square().sum().backward()
    for mine, exact in zip(leaves, reference, strict=True):
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - exact.grad).norm() / exact.grad.norm() < (1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_output_has_the_querys_dtype_under_autocast_too(impl):
    (q, k, v), s, b = tensors(dtype=torch.float32)
    want = attention(q, k, v, s, b, is_causal=True, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention(q, k, v, s, b, is_causal=True, impl=impl)
    assert got.dtype == torch.float32
    bound = rounding.closed_form(q, k, v, multipliers(s, b), CAUSAL, D**-0.5, torch.bfloat16)
    rounding.assert_within(got, want, 2 * bound)


def test_numpys_integers_are_integers():
    (q, k, v), s, b = tensors()
    got = attention(q, k, v, s, b, is_causal=True, window=np.int64(3))
    assert torch.equal(got, attention(q, k, v, s, b, is_causal=True, window=3))
    assert visible_keys(num_keys=np.int32(3), window=np.int64(2)).tolist() == [[1, 2, 2]]


def test_dropout_drops():
    (q, k, v), s, b = tensors(dtype=torch.float32)
    torch.manual_seed(0)
    for impl in TRAINED:
        dropped = attention(q, k, v, s, b, dropout_p=0.5, impl=impl)
        assert (dropped - attention(q, k, v, s, b, impl=impl)).abs().max() > 0.01


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_asked_and_nothing_to_see(impl, rows, keys):
    (q, k, v), s, b = tensors(rows, keys)
    for is_causal in (False, True):
        got = attention(q, k, v, s, b, is_causal=is_causal, impl=impl)
        assert got.shape == (B, H, rows, D)
        assert got.eq(0).all()


@pytest.mark.parametrize("impl", TRAINED)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_dead_row_passes_nothing_on_whatever_stands_in_it(impl, poison):
    (q, k, v), s, b = tensors()
    q[:, :, 1] = poison
    mask = torch.ones(N, S, dtype=torch.bool)
    mask[1] = False
    leaves = [x.requires_grad_() for x in (q, k, v, s, b)]
    output = attention(*leaves, attn_mask=mask, impl=impl)
    assert output[:, :, 1].eq(0).all()
    for gradient in torch.autograd.grad(output.square().sum(), leaves):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_a_bias_wider_than_the_query_is_not_rounded():
    (q, k, v), s, b = tensors(dtype=torch.float16)
    shifted = attention(q, k, v, s, b, n=S, attn_mask=torch.full((N, S), -1e5))
    plain = attention(q, k, v, s, b, n=S)
    open_keys = torch.ones(N, S, dtype=torch.bool)
    m = (s * math.log(S) + b)[:, None]
    bound = 2 * rounding.closed_form(q, k, v, m, open_keys, D**-0.5, torch.float16)
    logit = 2 * rounding.unit(torch.float32) * 1e5  # the bias is added, and the largest logit taken away
    rounding.assert_within(shifted, plain, bound + math.expm1(2 * logit) * v.abs().max())


def packed(lengths, padding):
    """Documents in one row, with unused tokens behind them."""
    (q, k, v), s, b = tensors(rows=sum(lengths) + padding, keys=sum(lengths) + padding, key_heads=2)
    return [x[:1] for x in (q, k, v)], s, b, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{"is_causal": True}, {"is_causal": True, "window": 2}, {}], ids=str)
@pytest.mark.parametrize(("lengths", "padding"), [([3, 0, 4], 0), ([0, 2, 0, 0, 3], 2), ([0], 3)])
def test_packed_documents_equal_the_oracle_and_their_n_restarts(lengths, padding, options, impl):
    (q, k, v), s, b, offsets = packed(lengths, padding)
    total = sum(lengths)
    open_keys = np.zeros((total + padding,) * 2, dtype=bool)
    open_keys[:total, :total] = oracle.documents(lengths, options.get("is_causal", False), options.get("window"))
    got = attention(q, k, v, s, b, cu_seqlens=offsets, enable_gqa=True, impl=impl, **options)
    want = oracle.attention(*(x.numpy() for x in (q, k, v, s, b)), np.broadcast_to(open_keys, (1, H, *open_keys.shape)))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)
    assert got[:, :, total:].eq(0).all()
    assert abs(want).max() > 0.1 or total == 0


def test_a_long_packed_document_is_computed_in_blocks():
    (q, k, v), s, b, offsets = packed([1100, 200], 7)
    options = {"cu_seqlens": offsets, "is_causal": True, "window": 100, "enable_gqa": True}
    want = attention(q, k, v, s, b, impl="reference", **options)
    torch.testing.assert_close(attention(q, k, v, s, b, impl="sdpa", **options), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"is_causal": True, "window": 2}, {}], ids=str)
def test_gradients_of_packed_documents_equal_the_reference_whatever_stands_in_the_padding(options):
    gradients = {}
    for impl in TRAINED:
        (q, k, v), s, b, offsets = packed([3, 0, 4, 1], 2)
        q[:, :, -2:] = math.nan
        leaves = [x.requires_grad_() for x in (q, k, v, s, b)]
        output = attention(*leaves, cu_seqlens=offsets, enable_gqa=True, impl=impl, **options)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        gradients[impl] = torch.autograd.grad((output * weights).sum(), leaves)
    for reference, other in zip(gradients["reference"], gradients["sdpa"], strict=True):
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(other, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_documents_take_an_explicit_n_and_a_softcap(impl):
    (q, k, v), s, b, offsets = packed([3, 4], 0)
    mask = torch.tensor(oracle.documents([3, 4]))
    got = attention(q, k, v, s, b, n=5, cu_seqlens=offsets, is_causal=True, enable_gqa=True, impl=impl)
    want = attention(q, k, v, s, b, n=5, attn_mask=mask, enable_gqa=True, impl="reference")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    if impl != "sdpa":
        got = attention(q, k, v, s, b, cu_seqlens=offsets, is_causal=True, softcap=0.5, enable_gqa=True, impl=impl)
        capped = attention(q, k, v, s, b, attn_mask=mask, softcap=0.5, enable_gqa=True, impl="reference")
        torch.testing.assert_close(got, capped, rtol=0, atol=1e-12)
        assert (capped - want).abs().max() > 0.01


def packed_causal(b, h, q, k):
    """Documents of 3 and 4 tokens."""
    return (q >= k) & ((q < 3) == (k < 3))


def test_a_block_mask_packs_documents_and_its_n_restarts():
    (q, k, v), s, b = tensors()
    blocks = create_block_mask(packed_causal, None, None, N, S, device="cpu")
    want = oracle.attention(
        *(x.numpy() for x in (q, k, v, s, b)), np.broadcast_to(oracle.documents([3, 4]), (B, H, N, S))
    )
    np.testing.assert_allclose(attention(q, k, v, s, b, attn_mask=blocks).numpy(), want, atol=1e-12)


def test_n_of_a_long_block_mask_is_counted_in_blocks():
    rows = 1100
    (q, k, v), s, b = tensors(rows=rows, keys=rows)
    blocks = create_block_mask(lambda b, h, q, k: (q >= k) & (b < 5), B, None, rows, rows, device="cpu")
    got = attention(q, k, v, s, b, attn_mask=blocks)
    torch.testing.assert_close(got, attention(q, k, v, s, b, is_causal=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_counts_keys_and_no_padding(impl, padded):
    (q, k, v), s, b = tensors(rows=9, keys=5)
    real = (
        torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
        if padded
        else torch.ones(2, 5, dtype=torch.bool)
    )
    got = attention(q, k, v, s, b, attn_mask=real[:, None, None] if padded else None, impl=impl)
    open_keys = np.broadcast_to(real[:, None, None].numpy(), (B, H, 9, 5))
    want = oracle.attention(*(x.numpy() for x in (q, k, v, s, b)), open_keys)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)
    n = visible_keys(mask=real, num_queries=9, causal=False)
    assert n.tolist() == real.sum(1)[:, None].expand(2, 9).tolist()
    torch.testing.assert_close(attention(q, k, v, s, b, n=n, attn_mask=real[:, None, None], impl=impl), got)


def test_a_shard_of_the_queries_needs_only_its_global_positions():
    (q, k, v), s, b = tensors()
    whole = attention(q, k, v, s, b, is_causal=True)
    shard = [1, 4, 6]
    mask = torch.tensor(oracle.causal(N, S))[shard]
    n = visible_keys(position_ids=torch.tensor(shard))
    torch.testing.assert_close(attention(q[:, :, shard], k, v, s, b, n=n, attn_mask=mask), whole[:, :, shard])


def test_a_rolling_cache_of_a_window_keeps_its_n():
    """A ragged batch: rows at positions 2 and 6, the cache holds the last 4 keys at most, empty slots hidden."""
    (q, k, v), s, b = tensors()
    whole = attention(q, k, v, s, b, is_causal=True, window=4)
    n = visible_keys(position_ids=torch.tensor([[2], [6]]), window=4)
    keys, values = (torch.stack([x[0, :, [0, 1, 2, 6]], x[1, :, 3:7]]) for x in (k, v))
    query = torch.stack([q[0, :, 2:3], q[1, :, 6:7]])
    filled = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)[:, None, None]
    got = attention(query, keys, values, s, b, n=n, attn_mask=filled)
    torch.testing.assert_close(got, torch.stack([whole[0, :, 2:3], whole[1, :, 6:7]]))


def test_a_tree_mask_counts_each_nodes_ancestors():
    (q, k, v), s, b = tensors()
    parents = [None, 0, 0, 1, 1, 2, 4]
    table = np.zeros((N, S), dtype=bool)
    for node, parent in enumerate(parents):
        table[node] = table[parent] if parent is not None else False
        table[node, node] = True
    got = attention(q, k, v, s, b, attn_mask=torch.tensor(table))
    want = oracle.attention(*(x.numpy() for x in (q, k, v, s, b)), np.broadcast_to(table, (B, H, N, S)))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)


def test_nothing_waits_for_the_device():
    """On the meta device reading any value raises."""
    q, k, v = (torch.empty(2, 4, 600, 8, device="meta", requires_grad=True) for _ in range(3))
    s = torch.empty(4, device="meta", requires_grad=True)
    masks = [
        None,
        torch.empty(2, 1, 1, 600, dtype=torch.bool, device="meta"),
        torch.empty(2, 1, 600, 600, device="meta"),
    ]
    for mask in masks:
        attention(q, k, v, s, attn_mask=mask, is_causal=True, window=100).sum().backward()
    for mask in masks[1:]:
        visible_keys(mask=mask[:, 0, 0] if mask.shape[2] == 1 else mask)
    positions = torch.empty(2, 600, dtype=torch.long, device="meta")
    attention(q, k, v, s, n=visible_keys(position_ids=positions))
    visible_keys(cu_seqlens=positions[0, :5], num_queries=600)


Q = torch.ones(2, 4, 3, 8)
BLOCKS = create_block_mask(lambda b, h, q, k: q >= k, None, None, 3, 3, device="cpu")
OFFSETS = torch.tensor([0, 1, 3])
PACKED = {"query": Q[:1], "key": Q[:1], "value": Q[:1], "cu_seqlens": OFFSETS}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"query": Q[0]}, ValueError, "query must be"),
        ({"query": Q.long()}, TypeError, "floating point"),
        ({"key": Q.double()}, TypeError, "key has dtype"),
        ({"key": Q[:1]}, ValueError, "batch size"),
        ({"key": Q[:, :2], "value": Q[:, :2]}, ValueError, "enable_gqa"),
        ({"key": Q[:, :3], "value": Q[:, :3], "enable_gqa": True}, ValueError, "divide"),
        ({"value": Q[:, :, :2]}, ValueError, "agree in heads and length"),
        ({"key": Q[..., :4]}, ValueError, "head size"),
        ({"s": torch.ones(3)}, ValueError, "s must be a number or one value for each of 4 heads"),
        ({"n": torch.ones(5)}, ValueError, "n must be"),
        ({"n": -3}, ValueError, "negative"),
        ({"window": 2}, ValueError, "needs is_causal"),
        ({"window": 0, "is_causal": True}, ValueError, "positive integer"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"attn_mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "attn_mask must broadcast"),
        ({"attn_mask": torch.ones(3, 3, dtype=torch.long)}, TypeError, "attn_mask must be bool or floating"),
        ({"impl": "flash"}, ValueError, "impl must be one of"),
        ({"softcap": math.inf}, ValueError, "finite"),
        ({"softcap": "5"}, TypeError, "softcap must be a number"),
        ({"scale": "a"}, TypeError, "scale must be a number"),
        ({"s": None}, TypeError, "s must be"),
        ({"key": Q.numpy()}, TypeError, "key must be a tensor"),
        ({"n": 4, "attn_mask": torch.zeros(3, 3).double(), "impl": "sdpa"}, ValueError, "would round the bias"),
        ({"impl": "flex", "dropout_p": 0.1}, ValueError, "no dropout"),
        ({"impl": "flex", "s": torch.ones(4, requires_grad=True)}, ValueError, "no gradients on the CPU"),
        ({"attn_mask": "causal"}, TypeError, "tensor or a BlockMask"),
        ({"attn_mask": BLOCKS, "impl": "sdpa"}, ValueError, "does not take a BlockMask"),
        ({"attn_mask": BLOCKS, "is_causal": True}, ValueError, "leave is_causal out"),
        ({"attn_mask": BLOCKS, "query": torch.ones(2, 4, 5, 8)}, ValueError, "BlockMask must be for"),
        ({"cu_seqlens": [0, 3]}, TypeError, "cu_seqlens must be a tensor"),
        ({"cu_seqlens": OFFSETS}, ValueError, r"packs documents in one row: .* got \(2, 4, 3, 8\)"),
        ({**PACKED, "query": Q[:1, :, :2]}, ValueError, "packs documents in one row"),
        ({**PACKED, "attn_mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "both say what is visible"),
        ({**PACKED, "cu_seqlens": OFFSETS.float()}, ValueError, "must be integers"),
        ({**PACKED, "cu_seqlens": OFFSETS.flip(0)}, ValueError, "start at 0 and never decrease"),
        ({**PACKED, "cu_seqlens": OFFSETS * 2, "n": 3}, ValueError, "ends at 6, but only 3 tokens"),
        ({**PACKED, "window": 2}, ValueError, "needs is_causal"),
    ],
)
def test_bad_calls_name_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        attention(**({"query": Q, "key": Q, "value": Q, "s": 0.4} | arguments))


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "keys", "window"), [(9, 9, None), (9, 12, None), (9, 9, 4), (1, 9, None)])
def test_beside_the_kernel_there_are_three_multiplications(rows, keys, window):
    """s log n, the scale, the query: on a CPU each further small operation costs 30 us between two kernels."""
    q, k, v = torch.randn(1, 2, rows, 4), *(torch.randn(1, 2, keys, 4) for _ in range(2))
    options = {"is_causal": True, "window": window}
    want = attention(q.double(), k.double(), v.double(), 0.4, impl="reference", **options)
    s = torch.full((2,), 0.4)
    with torch.inference_mode():  # what it keeps must serve a backward too
        attention(q, k, v, s, **options)
    with _Operations() as made:
        got = attention(q, k, v, s, **options)
    torch.testing.assert_close(got, want.float())
    if window is None and rows in (1, keys):  # no mask
        assert [x for x in made.names if x not in ("view", "unsqueeze", "slice", "alias", "lift_fresh")][:-1] == [
            "mul"
        ] * 3
    assert not {"arange", "log", "clamp", "all"} & set(made.names[: made.names.index("mul") + 1])
    attention(q, k, v, s.requires_grad_(), **options).sum().backward()
    assert s.grad is not None


@pytest.mark.parametrize("masked", [False, True])
def test_a_decode_step_with_grouped_heads_equals_the_reference(masked):
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 6, 1, 8), (2, 2, 9, 8), (2, 2, 9, 5), (6,))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    options = {"is_causal": True, "enable_gqa": True}
    if masked:
        options["attn_mask"] = torch.ones(2, 1, 1, 9, dtype=torch.bool)
        options["attn_mask"][1, ..., :4] = False
    got, want = (attention(*inputs, impl=impl, **options) for impl in ("sdpa", "reference"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    upstream = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    found, exact = (torch.autograd.grad(output, inputs, upstream) for output in (got, want))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)
