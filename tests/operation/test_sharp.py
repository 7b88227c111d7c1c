"""Sharp decoding against the reference in float64: the bound holds in every trial, and breaking its margins breaks it."""

import math

import numpy as np
import pytest
import rounding
import torch

from ssmax import ScreenedKeys, attention
from ssmax.sharp import decode, keys

pytestmark = pytest.mark.usefixtures("exact_int8")
S, D = 4352, 16
KINDS = (
    "flat",
    "random",
    "peaked",
    "needle",
    "ties",
    "duplicates",
    "huge",
    "negative",
    "denormal",
    "zero query",
    "outlier channels",
    "offset channels",
    "outlier keys",
    "rotated",
)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def draw(kind, trial, dtype=torch.float32, batch=1, heads=2, groups=1, queries=1, length=S, size=D):
    """Query, key, value and s of a trial."""
    g = torch.Generator().manual_seed(trial)
    k, v = (torch.randn(batch, heads, length, size, generator=g) for _ in range(2))
    q = torch.randn(batch, heads * groups, queries, size, generator=g)
    s = 0.43
    if kind in ("needle", "huge", "ties", "duplicates", "negative"):
        target = torch.randint(length, (batch, heads, queries), generator=g)
        own = k.gather(2, target[..., None].expand(-1, -1, -1, size))
        if kind == "duplicates":  # eight keys with the needle's own number, and values that differ
            places = torch.randint(length, (8,), generator=g)
            k[:, :, places] = own[:, :, :1]
        if kind == "ties":  # another key as large, on the other side of the query
            k[:, :, trial % length] = own[:, :, 0] + 1e-4 * torch.randn(batch, heads, size, generator=g)
        q = own.repeat_interleave(groups, 1) * {"huge": 3e4}.get(kind, 2.0)
        s = -0.43 if kind == "negative" else s
    if kind == "flat":
        q = 0.1 * q
    if kind == "peaked":
        s = 3.0
    if kind == "denormal":
        q, k = q * 1e-38, k * 1e-3
    if kind == "zero query":
        q = 0 * q
    if kind == "outlier channels":
        k[..., :2] *= 300
        q[..., :2] *= 0.02
        s = 2.0
    if kind == "offset channels":
        k[..., :3] += 50
        s = 3.0
    if kind == "outlier keys":
        k[:, :, torch.randint(length, (5,), generator=g)] *= 30
    if kind == "rotated":  # keys in a narrow cone, as the keys of trained models
        k = k * 0.3 + 3 * torch.randn(batch, heads, 1, size, generator=g)
        s = 4.0
    return *(x.to(dtype) for x in (q, k, v)), s


def exact(q, k, v, s, **options):
    return attention(q.double(), k.double(), v.double(), s, impl="reference", enable_gqa=True, **options)


def worst(got, want):
    return (got.double() - want).abs().max().item()


def allowed(got, value, tolerance):
    """2 tolerance max|v| and the rounding of the result."""
    return (2 * tolerance + 2 * torch.finfo(got.dtype).eps) * value.abs().max().item()


def rounded(q, k, v, s, visible):
    """What rounding may do to each output of any kernel of the dtype: the heads that are not sharp are such a kernel's."""
    m = s * visible.expand(*q.shape[:3], -1).sum(-1).double().log()
    return rounding.closed_form(q, k, v, m, visible, q.shape[-1] ** -0.5, q.dtype)


@pytest.fixture
def used(monkeypatch):
    """Heads that were served from few keys."""
    counted = []
    original = decode._attend

    def watched(rows, key, value, seen, found):
        counted.extend(len(keys) for keys in found.values())
        return original(rows, key, value, seen, found)

    monkeypatch.setattr(decode, "_attend", watched)
    return counted


@pytest.mark.parametrize("kind", KINDS)
def test_bound_holds_in_each_of_a_thousand_trials(kind, used):
    # 14 kinds x 72 trials.
    for trial in range(72):
        tolerance = (1e-3, 1e-2, 1e-5)[trial % 3]
        dtype = (torch.float32, torch.float32, torch.bfloat16, torch.float16)[trial % 4]
        if dtype == torch.float16 and kind == "huge":
            dtype = torch.float32
        shape = {"batch": 1 + trial % 2, "groups": 1 + trial % 3, "queries": 1 + trial % 5 // 4, "length": S - trial}
        q, k, v, s = draw(kind, trial, dtype, **shape)
        if trial % 9 == 8:  # left padding, poisoned
            hidden = 37 * trial % k.shape[2]
            options = {"attn_mask": (torch.arange(k.shape[2]) >= hidden)[None, None, None], "is_causal": True}
            k[:, :, :hidden], v[:, :, :hidden] = 1e4, 1e4
        else:
            options = {"is_causal": True}
        screened = ScreenedKeys(k[:, :, : 4200 - trial])
        assert screened.ready()
        for part in k[:, :, 4200 - trial :].split(50, 2):
            screened.append(part)
        want = exact(q, k, v, s, **options)
        got = attention(q, screened, v, s, impl="sharp", tolerance=tolerance, enable_gqa=True, **options)
        seen_v = v[:, :, hidden:] if trial % 9 == 8 else v
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])[None, None]
        visible = visible & options["attn_mask"] if trial % 9 == 8 else visible
        bound = allowed(got, seen_v, tolerance) + rounded(q, k, v, s, visible)
        rounding.assert_within(got, want, bound, f"{kind}, trial {trial}")
        unscreened = attention(q, k, v, s, impl="sharp", tolerance=tolerance, enable_gqa=True, **options)
        rounding.assert_within(unscreened, want, bound, f"{kind}, trial {trial}, unscreened")
    if kind in ("peaked", "needle", "ties", "duplicates", "huge", "outlier channels", "offset channels", "rotated"):
        assert len(used) > 100
        assert max(used) < 0.2 * S  # it did leave keys out
    if kind in ("flat", "denormal", "zero query"):
        assert not used


def test_scores_in_the_millions_keep_the_bound_alone():
    """No allowance for a kernel's rounding: float32 scores of equal keys differ by whole nats here."""
    for trial in range(20):
        q, k, v, s = draw("duplicates", trial)
        q = q * 1e5
        got = attention(q, ScreenedKeys(k), v, s, impl="sharp")
        want = exact(q, k, v, s)
        assert worst(got, want) <= allowed(got, v, 1e-3)


def test_without_the_margin_of_the_keys_the_screen_would_be_wrong():
    """Fifty keys nearly the same lead by more than rounding can tell; the query is one that int8 holds exactly."""
    broken_ones = 0
    for trial in range(10):
        q, k, v, _ = draw("random", trial)
        sound, broken = ScreenedKeys(k[:, :, 50:]), ScreenedKeys(k[:, :, 50:])
        assert sound.ready()
        q = (q / q.abs().amax(-1, keepdim=True) * 127).round() / sound._width / 127 * 0.05
        for screened in (sound, broken):
            assert screened.ready()
            screened.append((2 * q + 0.05 * k[:, :, :50]).float())
            assert screened.ready()
        broken._lost.filled.zero_()
        broken._most.filled.zero_()
        q, k = (3e4 * q).float(), sound.keys
        want = exact(q, k, v, 0.43)
        bound = allowed(v, v, 1e-3)
        assert worst(attention(q, sound, v, 0.43, impl="sharp"), want) <= bound
        broken_ones += worst(attention(q, broken, v, 0.43, impl="sharp"), want) > bound
    assert broken_ones > 0


def test_without_the_margin_of_the_query_the_screen_would_be_wrong():
    """Two keys that int8 holds exactly lead; the first has 50.49 x 20, the second 49.51 x 20 and 0.51 x 20 more."""
    _, k, v, _ = draw("random", 0)
    sound, broken = ScreenedKeys(k[:, :, 2:]), ScreenedKeys(k[:, :, 2:])
    wide, codes = torch.zeros(D, dtype=torch.float64), torch.zeros(2, D)
    wide[:4] = torch.tensor([127.0, 50.49, 49.51, 0.51])
    codes[:, 0], codes[0, 1], codes[1, 2:4] = 100, 20, 20
    for screened in (sound, broken):
        assert screened.ready()
        screened.append((screened._centre + codes * screened._width).float())
        assert screened.ready()
        screened._lost.filled.zero_()  # the query's margin has to hold alone
        screened._most.filled.zero_()
    broken._longest.zero_()
    q, k = (100 * wide / sound._width).float(), sound.keys
    want = exact(q, k, v, 0.43)
    torch.testing.assert_close(want[:, :, 0], v[:, :, -2].double())
    bound = allowed(v, v, 1e-3)
    assert worst(attention(q, sound, v, 0.43, impl="sharp"), want) <= bound
    assert worst(attention(q, broken, v, 0.43, impl="sharp"), want) > bound


def test_summed_weights_keep_the_tolerance(used):
    """Many small keys: what is left out may reach the tolerance and never passes it."""
    q, k, _, _ = draw("random", 0, length=16384)
    for s in (1.0, 1.3, 1.6):
        screened = ScreenedKeys(k)
        assert screened.ready()
        m = s * math.log(16384)
        rows = (q[0] * m * D**-0.5).double()
        found = screened.candidates(rows, np.array([(0, 0), (0, 1)]), None, 1e-2, 1.0)
        for head, kept in enumerate(found):
            weights = (rows[head] @ k[0, head].double().T).softmax(-1)[0]
            assert len(kept) < 0.25 * 16384
            assert 1 - weights[kept].sum() <= 1e-2


def test_appending_rounds_new_keys_only_and_cropping_forgets():
    _, k, _, _ = draw("random", 1)
    screened = ScreenedKeys(k[:, :, :4200])
    assert screened.ready()
    codes = screened._codes.filled.clone()
    screened.append(k[:, :, 4200:])
    assert screened.ready()
    assert torch.equal(screened._codes.filled[:, :, :4200], codes)
    whole = screened._codes.filled.clone()
    screened.crop(4100)
    screened.append(torch.full_like(k[:, :, :100], 7.0))
    assert screened.ready()
    assert not torch.equal(screened._codes.filled[:, :, 4100:4200], whole[:, :, 4100:4200])
    screened.crop(4100)
    screened.append(k[:, :, 4100:])
    assert screened.ready()
    assert torch.equal(screened._codes.filled, whole)
    assert torch.equal(screened.keys, k)
    assert len(screened) == S
    most = torch.nn.functional.pad(screened._lost.filled, (0, -S % 256)).unflatten(-1, (-1, 256)).amax(-1)
    assert torch.equal(screened._most.filled, most)


def test_the_given_keys_stay_their_owners():
    _, k, _, _ = draw("random", 1)
    before = k.clone()
    screened = ScreenedKeys(k)
    screened.crop(10)
    screened.append(torch.zeros_like(k[:, :, :5]))
    assert torch.equal(k, before)


def test_flat_heads_are_asked_ever_more_rarely(monkeypatch):
    q, k, v, _ = draw("random", 3)
    q[:, 0] = 3 * k[:, 0, 99:100]
    asked = []
    original = ScreenedKeys.candidates

    def counted(self, query, heads, *rest):
        asked.append(heads.tolist())
        return original(self, query, heads, *rest)

    monkeypatch.setattr(ScreenedKeys, "candidates", counted)
    screened = ScreenedKeys(k)
    want = exact(q, k, v, 0.43)
    for _ in range(40):
        got = attention(q, screened, v, 0.43, impl="sharp")
        assert worst(got, want) <= allowed(got, v, 1e-3)
    assert all([0, 0] in heads for heads in asked)
    assert len(asked) == 40
    assert sum([0, 1] in heads for heads in asked) == 4  # after waits of 4, 8 and 16


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_key_that_is_not_finite_is_not_hidden(poison):
    q, k, v, s = draw("needle", 0)
    screened = ScreenedKeys(k[:, :, :-1])
    assert screened.ready()
    k[:, :, -1, 0] = poison
    screened.append(k[:, :, -1:])
    assert attention(q, screened, v, s, impl="sharp").isnan().any() == attention(q, k, v, s).isnan().any()


def test_a_row_that_sees_nothing_gives_zeros_and_one_that_sees_one_key_its_value():
    q, k, v, s = draw("needle", 0, batch=3)
    mask = torch.zeros(3, 1, 1, S, dtype=torch.bool)
    mask[1, ..., 70] = True
    mask[2] = True
    for key in (ScreenedKeys(k), k):
        got = attention(q, key, v, s, attn_mask=mask, impl="sharp")
        assert not got[0].any()
        assert torch.equal(got[1, :, 0], v[1, :, 70])
        assert worst(got, exact(q, k, v, s, attn_mask=mask)) <= allowed(got, v, 1e-3)


def test_a_machine_that_saturates_leaves_out_values_only(monkeypatch, used):
    def saturating(query, codes, out):
        products = (query[:, None].int() + 128) * codes.int()  # unsigned times signed, added in pairs of 16 bits
        pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
        out.copy_(pairs.sum(-1) - 128 * codes.int().sum(-1))

    monkeypatch.setattr(keys, "int8_product", lambda query, codes, out: out.copy_(query.int() @ codes.int().T))
    keys.int8_is_exact.cache_clear()
    try:
        assert keys.int8_is_exact()
        monkeypatch.setattr(keys, "int8_product", saturating)
        keys.int8_is_exact.cache_clear()
        assert not keys.int8_is_exact()
        q, k, v, s = draw("needle", 0)
        screened = ScreenedKeys(k)
        assert not screened.ready()
        got = attention(q, screened, v, s, impl="sharp")
        assert worst(got, exact(q, k, v, s)) <= allowed(got, v, 1e-3)
        assert used
        monkeypatch.undo()
        keys.int8_is_exact.cache_clear()
        monkeypatch.delattr(torch, "_int_mm")  # as in a torch that has none
        assert not keys.int8_is_exact()
    finally:
        keys.int8_is_exact.cache_clear()


def test_short_caches_windows_and_prefills_are_plain(used):
    q, k, v, s = draw("needle", 0, length=300)
    for options in ({}, {"is_causal": True}, {"is_causal": True, "window": 64}):
        assert torch.equal(
            attention(q, ScreenedKeys(k), v, s, impl="sharp", **options), attention(q, k, v, s, **options)
        )
    q, k, v, s = draw("needle", 0, queries=12)
    plain = attention(q, k, v, s, is_causal=True)
    assert torch.equal(attention(q, ScreenedKeys(k), v, s, is_causal=True, impl="sharp"), plain)
    assert not used


def test_refusals():
    q, k, v, s = draw("random", 0, length=10)
    with pytest.raises(ValueError, match="tolerance must be a number between 0 and 1, got 0"):
        attention(q, k, v, s, impl="sharp", tolerance=0)
    with pytest.raises(ValueError, match="'sharp' has no softcap"):
        attention(q, k, v, s, impl="sharp", softcap=3.0)
    with pytest.raises(ValueError, match="'sharp' has no dropout"):
        attention(q, k, v, s, impl="sharp", dropout_p=0.1)
    with pytest.raises(ValueError, match="takes no bias"):
        attention(q, k, v, s, impl="sharp", n=10, attn_mask=torch.zeros(10))
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradients"):
        attention(q, k.requires_grad_(), v, s, impl="sharp")
    with pytest.raises(ValueError, match="keys must be"):
        ScreenedKeys(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="floating-point"):
        ScreenedKeys(torch.zeros(1, 1, 3, 4, dtype=torch.int8))
    screened = ScreenedKeys(k)
    with pytest.raises(ValueError, match="keys to append must be"):
        screened.append(k.double())
    with pytest.raises(ValueError, match="length must be 0 to 10"):
        screened.crop(11)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_query_that_is_not_finite_is_not_hidden(poison):
    q, k, v, s = draw("needle", 0)
    q[0, 0, 0, 3] = poison
    for mask in (None, (torch.arange(S) > 10)[None, None, None]):
        for key in (ScreenedKeys(k), k):
            got = attention(q, key, v, s, attn_mask=mask, impl="sharp")
            assert got[:, 0].isnan().all()
            assert worst(got[:, 1:], exact(q, k, v, s, attn_mask=mask)[:, 1:]) <= allowed(got, v, 1e-3)


def test_after_a_crop_the_screen_serves_the_keys_that_are_left():
    q, k, v, s = draw("needle", 0, length=8192)
    screened = ScreenedKeys(k)
    attention(q, screened, v, s, impl="sharp")
    screened.crop(5000)
    got = attention(q, screened, v[:, :, :5000], s, impl="sharp")
    assert worst(got, exact(q, k[:, :, :5000], v[:, :, :5000], s)) <= allowed(got, v, 1e-3)


def test_values_and_queries_that_are_not_finite_stay_in_their_heads():
    q, k, v, s = draw("needle", 0, heads=2, groups=2)
    v[0, 1, (k[0, 1] @ q[0, 2, 0]).argmax()] = torch.inf
    q[0, 1] = torch.nan
    got = attention(q, ScreenedKeys(k), v, s, impl="sharp", enable_gqa=True)
    assert got[0, 0].isfinite().all()
    assert got[0, 1].isnan().all()
    assert (got[0, 2] == torch.inf).all()


def test_under_torch_compile_it_is_the_same():
    q, k, v, s = draw("needle", 0)
    screened = ScreenedKeys(k)
    for key in (screened, k):
        compiled = torch.compile(lambda q, v, key=key: 2 * attention(q + 0, key, v, s, impl="sharp"))
        assert worst(compiled(q, v) / 2, exact(q, k, v, s)) <= allowed(q, v, 1e-3)


def test_heads_that_need_few_keys_read_few():
    """Diffuse heads: a thousand keys lie above the floor, and few of them hold the weight."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 8, n, 64, generator=generator) for n in (1, 16384, 16384))
    screened = ScreenedKeys(key)
    attention(query, screened, value, 1.0, impl="sharp")
    assert (screened.share_read() <= decode.MOST_KEPT).all()
