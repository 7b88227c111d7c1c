"""Any torch.nn.Module whose attention is torch's function: exact, loud where it is not, and back again bit for bit."""

import copy
import functools
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attention_modules import (
    GPT,
    HEADS,
    WIDTH,
    Attention,
    CausalSelfAttention,
    CrossAttention,
    Denoiser,
    Naive,
    Stack,
    merge,
    naive_attention,
    split,
)
from module_checks import OPEN, causal, close, converted, differs, inputs, made, trains_alike
from torch import nn
from torch.nn.attention.bias import causal_lower_right

import ssmax

TOKENS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))


def test_a_causal_transformer_whole_and_cached():
    plain = made(GPT)
    model, scales = converted(plain, (TOKENS,))
    assert [name for name, module in model.named_modules() if name.endswith("ssmax")] == [
        "h.0.attn.ssmax",
        "h.1.attn.ssmax",
    ]
    with Naive(*((s, b, causal(9, 9)) for s, b in scales)):
        want = plain(TOKENS)
    got = model(TOKENS)
    close(got, want)
    differs(got, plain(TOKENS))
    trains_alike(model, got, plain, want)
    for pieces in ([6, 1, 1, 1], [4, 3, 2]):
        caches, start, parts = [[], []], 0, []
        for count in pieces:
            parts.append(model(TOKENS[:, start : start + count], caches, start))
            start += count
        close(torch.cat(parts, 1), want)


class Stepping(nn.Module):
    """Attention whose decoding is a method of its own; its forward calls a part of itself, and another attention after it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.after = nn.Linear(WIDTH, 3 * WIDTH), Attention()

    def forward(self, x):
        return self.after(self.attend(*self.project(x), is_causal=True))

    def project(self, x):
        return [split(part) for part in self.qkv(x).chunk(3, -1)]

    def attend(self, q, k, v, **options):
        return merge(F.scaled_dot_product_attention(q, k, v, **options))

    def step(self, x, cache):
        q, k, v = self.project(x)
        cache.append((k, v))
        return self.attend(q, *(torch.cat(parts, -2) for parts in zip(*cache, strict=True)))


@pytest.mark.parametrize("compiled", [False, True])
def test_other_methods_of_an_attention_are_scaled_too(compiled):
    x, plain = inputs(2, 5, WIDTH), made(Stepping)
    model, ((s, b), (t, c)) = converted(plain, (x,))
    with Naive((s, b, causal(5, 5)), (t, c, OPEN)):
        want = plain(x)
    close((torch.compile(model, fullgraph=True, backend="eager") if compiled else model)(x), want)
    with Naive((s, b, causal(5, 5))):
        want = plain.attend(*plain.project(x), is_causal=True)
    cache = []
    close(torch.cat([model.step(x[:, i : i + 1], cache) for i in range(5)], 1), want)
    differs(want, plain.attend(*plain.project(x), is_causal=True))
    model.after.fused_attn = False
    with pytest.raises(ValueError, match="this forward did not call"):
        model(x)
    cache.clear()
    close(model.step(x[:, :1], cache), want[:, :1])  # the forward that failed left nothing behind
    assert torch.equal(ssmax.revert(model).step(x, []), plain.step(x, []))


class Overriding(Stepping):
    @torch.no_grad()
    def attend(self, q, k, v, **options):
        return super().attend(q, k, v, **options)

    def forward(self, x):
        return self.after(Stepping.attend(self, *self.project(x), is_causal=True))


def test_a_method_that_calls_that_of_its_base_is_scaled_once(monkeypatch):
    x, plain = inputs(2, 5, WIDTH), made(Overriding)
    model, ((s, b), _) = converted(plain, (x,))
    with Naive((s, b, OPEN)):
        want = plain.attend(*plain.project(x))
    close(model.attend(*model.project(x)), want)
    monkeypatch.setattr(
        Stepping, "attend", lambda self, q, k, v, **options: 2 * merge(F.scaled_dot_product_attention(q, k, v))
    )
    close(model.attend(*model.project(x)), 2 * want)  # not a function of before


class Caller(nn.Module):
    """Calls both the forward and another method of one attention."""

    def __init__(self):
        super().__init__()
        self.inner = Stepping()

    def forward(self, x):
        return self.inner(x) + self.inner.attend(*self.inner.project(x))


@pytest.mark.filterwarnings("ignore:called more than once")
def test_a_method_that_a_parent_calls_belongs_to_its_own_module():
    x, plain = inputs(2, 5, WIDTH), made(Caller)
    model, ((s, b), (t, c)) = converted(plain, (x,))
    names = {name for name, _ in model.named_modules() if name.endswith("ssmax")}
    assert names == {"inner.ssmax", "inner.after.ssmax"}
    with Naive((s, b, causal(5, 5)), (t, c, OPEN), (s, b, OPEN)):
        close(model(x), plain(x))


def test_a_mask_that_holds_no_values_is_refused():
    class Lower(Attention):
        def forward(self, x):
            q, k, v = (split(part) for part in self.qkv(x).chunk(3, -1))
            return merge(F.scaled_dot_product_attention(q, k, v, causal_lower_right(x.shape[1], x.shape[1])))

    with pytest.raises(ValueError, match=r"a mask of torch.nn.attention.bias cannot be read; pass is_causal=True"):
        ssmax.convert(made(Lower), 0.5, example=(inputs(2, 5, WIDTH),))


def test_a_vision_transformer_at_two_sizes():
    plain = made(Stack, Attention(), Attention())
    model, scales = converted(plain, (inputs(2, 5, WIDTH),))
    for length in (5, 17):
        x = inputs(3, length, WIDTH)
        got = model(x)
        with Naive(*((s, b, OPEN) for s, b in scales)):
            close(got, plain(x))
        differs(model(x), plain(x))


def test_cross_attention_stays_unless_asked_for():
    plain, x, context = made(Denoiser), inputs(2, 6, WIDTH), inputs(2, 6, WIDTH, seed=2)  # as many keys as queries
    model, ((s, b),) = converted(plain, (x, context))
    assert not hasattr(model.attn2, "ssmax")
    assert type(model.attn2) is CrossAttention
    got = model(x, context)
    with Naive((s, b, OPEN), None):
        close(got, plain(x, context))
    model, ((s, b), (t, c)) = converted(plain, {"x": x, "context": context}, cross=True)
    hidden = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    hidden[0, ..., 4:] = True
    for mask in (~hidden, torch.zeros(2, 1, 1, 6).double().masked_fill(hidden, -torch.inf)):
        got = model(x, context, mask)
        with Naive((s, b, OPEN), (t, c, ~hidden)):
            close(got, plain(x, context, mask))
    assert ssmax.convert(copy.deepcopy(plain), 0.5, layers=["attn2"], example=(x, context)).attn2.ssmax
    alone = CrossAttention().double()
    with pytest.raises(ValueError, match="all attention of CrossAttention is cross attention"):
        ssmax.convert(alone, 0.5, example=(x, context))


class Core(nn.Module):
    """Attends for the module around it, which is told by what that one is given."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_kv, self.attend = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), Sdpa()

    def forward(self, x, context=None):
        k, v = self.to_kv(x if context is None else context).chunk(2, -1)
        return merge(self.attend(split(self.to_q(x)), split(k), split(v)))


def test_a_core_that_is_given_heads_is_told_by_the_module_around_it():
    x, context = inputs(2, 5, WIDTH), inputs(2, 5, WIDTH, seed=2)
    assert ssmax.convert(made(Core), 0.5, example=(x,)).attend.ssmax
    with pytest.raises(ValueError, match=r"cross attention \(attend\)"):
        ssmax.convert(made(Core), 0.5, example=(x, context))


class Projected(nn.Module):
    """Self-attention whose own projections come before nn.MultiheadAttention, or a core that norms (B, N, H, D), or a cache."""

    def __init__(self, way):
        super().__init__()
        self.way, self.qkv = way, nn.Linear(WIDTH, 3 * WIDTH)
        cores = {
            "multihead": functools.partial(nn.MultiheadAttention, WIDTH, HEADS, batch_first=True),
            "normed": Normed,
        }
        self.core = cores.get(way, nn.Identity)()
        self.register_buffer("cache", torch.zeros(2, 2, HEADS, 16, WIDTH // HEADS))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.way == "multihead":
            return self.core(q, k, v, need_weights=False)[0]
        if self.way == "normed":
            return self.core(*(part.unflatten(-1, (HEADS, -1)) for part in (q, k, v)))
        for kept, new in zip(self.cache, (k, v), strict=True):
            kept[:, :, : x.shape[1]].copy_(split(new))
        return merge(F.scaled_dot_product_attention(split(q), *self.cache[..., : x.shape[1], :]))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH // HEADS)

    def forward(self, q, k, v):
        q, k, v = (part.transpose(1, 2) for part in (self.norm(q), self.norm(k), v))
        return merge(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("way", ["multihead", "normed", "cache"])
def test_projections_norms_and_caches_do_not_make_it_cross_attention(way):
    model = ssmax.convert(made(Projected, way), 0.5, example=(inputs(2, 5, WIDTH),))
    assert any(name.endswith("ssmax") for name, _ in model.named_modules())


@pytest.mark.parametrize(
    "halves",
    [
        lambda x: x.chunk(2, 0),
        lambda x: (x[:, :3], x[:, 3:]),
        lambda x: (x.unflatten(1, (2, -1))[:, 0], x.unflatten(1, (2, -1))[:, 1]),
        lambda x: (x, torch.zeros_like(x)),
    ],
)
def test_two_parts_of_one_input_are_cross_attention(halves):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.cross = Attention(), CrossAttention()

        def forward(self, x):
            return self.cross(*halves(self.own(x)))

    model = ssmax.convert(made(Pair), 0.5, example=(inputs(2, 6, WIDTH),))
    assert [name for name, _ in model.named_modules() if name.endswith("ssmax")] == ["own.ssmax"]


def test_a_memory_that_is_changed_in_place_through_a_view_is_another_input():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.cross = Attention(), CrossAttention()

        def forward(self, x):
            memory = torch.ones(2, 7, WIDTH, dtype=x.dtype)
            memory[:, 3:].mul_(2)
            return self.cross(self.own(x), memory)

    model = ssmax.convert(made(Remembers), 0.5, example=(inputs(2, 6, WIDTH),))
    assert [name for name, _ in model.named_modules() if name.endswith("ssmax")] == ["own.ssmax"]


class Sdpa(nn.Module):
    """One call, as it is asked for."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


def seen(*shape):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(4)) > 0.4
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize(
    ("shape", "options", "mask", "visible"),
    [
        ((2, HEADS, 5, 8, 7), {"is_causal": True}, None, causal(5, 7)),
        ((2, HEADS, 7, 8, 5), {"is_causal": True}, None, causal(7, 5)),
        ((2, HEADS, 5, 8, 7), {"scale": 0.3}, None, OPEN),
        ((2, HEADS, 5, 8, 7), {}, seen(2, HEADS, 5, 7), seen(2, HEADS, 5, 7)),
        ((2, HEADS, 5, 8, 7), {}, seen(5, 7), seen(5, 7)),
        ((2, HEADS, 5, 8, 7), {}, seen(HEADS, 5, 7), seen(HEADS, 5, 7)),
        ((2, HEADS, 5, 8, 7), {}, seen(2, 1, 1, 7), seen(2, 1, 1, 7)),
        ((2, HEADS, 5, 8, 7), {}, seen(1, 7), seen(1, 7)),
        ((2, 3, HEADS, 5, 8, 7), {}, seen(3, 1, 5, 7), seen(3, 1, 5, 7)),
        ((2, 3, HEADS, 5, 8, 7), {"is_causal": True}, None, causal(5, 7)),
        ((2, 5, 8, 7), {}, seen(2, 5, 7), seen(2, 5, 7)),
        ((2, 5, 8, 7), {}, seen(5, 7), seen(5, 7)),
        ((5, 8, 7), {"is_causal": True}, None, causal(5, 7)),
    ],
)
def test_n_is_counted_by_torchs_own_rules(shape, options, mask, visible):
    """shape: of the query, and the number of keys behind it."""
    *shape, keys = shape
    q, k, v = (inputs(*shape[:-2], n, shape[-1], seed=i) for i, n in enumerate((shape[-2], keys, keys)))
    model, ((s, b),) = converted(Sdpa(**options), (q, k, v, mask))
    heads = HEADS if len(shape) > 3 else 1
    assert s.shape == (heads,)
    lift = (lambda x: x) if len(shape) > 3 else (lambda x: x.unsqueeze(-3))
    visible = lift(visible) if visible.ndim > 2 else visible
    want, _ = naive_attention(*map(lift, (q, k, v)), s, b, visible, options.get("scale"))
    masks = (mask, mask) if mask is None else (mask, torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf))
    for given in masks:
        got = model(q, k, v, given)
        close(got, want if len(shape) > 3 else want.squeeze(-3))
        differs(got, F.scaled_dot_product_attention(q, k, v, given, **options))


def test_a_bias_is_refused_at_convert_and_later():
    model, q, bias = Sdpa(), inputs(1, 2, 3, 4), inputs(3, 3)
    with pytest.raises(ValueError, match="attention of the model cannot be converted: an additive mask holds 0"):
        ssmax.convert(model, 0.5, example=(q, q, q, bias))
    assert type(model) is Sdpa
    ssmax.convert(model, 0.5, example=(q, q, q))
    with pytest.raises(ValueError, match="an additive mask holds 0"):
        model(q, q, q, bias)
    with pytest.raises(ValueError, match="an additive mask that is learned is a bias"):
        model(q, q, q, torch.zeros(3, 3).double().requires_grad_())


class Windows(nn.Module):
    """Attends within windows; heads are the third last of the query's dimensions, as torch has it, or the second."""

    def __init__(self, order):
        super().__init__()
        self.heads, self.order = HEADS, order

    def forward(self, x_BWTE):
        q = x_BWTE.unflatten(-1, (HEADS, -1)).permute(0, *self.order, 2, 4)
        return F.scaled_dot_product_attention(q, q, q)


def test_heads_of_a_query_of_five_dimensions_are_where_the_module_says_it_has_as_many():
    x = inputs(2, 3, 5, WIDTH)
    model, ((s, b),) = converted(Windows((1, 3)), (x,))
    q = x.unflatten(-1, (HEADS, -1)).transpose(-2, -3)
    close(model(x), naive_attention(q, q, q, s, b, OPEN)[0])
    with pytest.raises(ValueError, match="says that it has 4 heads, and calls attention with a query of 5 dimensions"):
        ssmax.convert(Windows((3, 1)), 0.5, example=(x,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_masks_is_a_batch():
    model, q = Sdpa(), inputs(3, 2, HEADS, 5, 8)
    mask = torch.zeros(3, 1, 1, 5, 5).double().masked_fill(torch.rand(3, 1, 1, 5, 5) < 0.3, -torch.inf)
    mask[..., 0] = 0
    model, _ = converted(model, (q[0], q[0], q[0], mask[0]))
    for given in (mask, mask == 0):
        want = torch.stack([model(x, x, x, m) for x, m in zip(q, given, strict=True)])
        close(torch.func.vmap(lambda x, m: model(x, x, x, m))(q, given), want)


@pytest.mark.parametrize("name", ["packet", "overload", "context", "autocast", "checkpoint"])
def test_a_call_is_seen_however_it_is_made(name):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.checkpoint import checkpoint

    aten = torch.ops.aten.scaled_dot_product_attention

    class Model(nn.Module):
        def forward(self, q):
            if name == "packet":
                return aten(q, q, q)
            if name == "overload":
                return aten.default(q, q, q, is_causal=False)
            if name == "context":
                with sdpa_kernel(SDPBackend.MATH):
                    return F.scaled_dot_product_attention(query=q, key=q, value=q)
            return F.scaled_dot_product_attention(q, q, q)

    q = inputs(2, HEADS, 5, 8).requires_grad_()
    if name == "autocast":
        q = q.detach().float().requires_grad_()
    model, ((s, b),) = converted(Model(), (q,))
    want, _ = naive_attention(q.double(), q.double(), q.double(), s, b, OPEN)
    if name == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = model(q)
        assert got.dtype == torch.bfloat16
        close(got.double(), want.detach(), 0.05)
        return
    got = checkpoint(model, q, use_reentrant=False) if name == "checkpoint" else model(q)
    close(got, want)
    (mine,), (truth,) = (torch.autograd.grad(y.square().sum(), q, retain_graph=True) for y in (got, want))
    close(mine, truth)


def test_a_checkpoint_inside_of_a_forward_is_never_softmax_in_silence():
    from torch.utils.checkpoint import CheckpointError, checkpoint

    class Model(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.reentrant = reentrant

        def forward(self, q):
            return checkpoint(F.scaled_dot_product_attention, q, q, q, use_reentrant=self.reentrant)

    q = inputs(2, HEADS, 5, 8).requires_grad_()
    with pytest.raises(ValueError, match="Checkpoint the whole module, or"):
        ssmax.convert(Model(True), 0.5, example=(q,))(q)
    with pytest.raises(CheckpointError):
        ssmax.convert(Model(False), 0.5, example=(q,))(q).sum().backward()


class Nested(nn.Module):
    """Calls attention, and holds a module that does."""

    def __init__(self, inner=None):
        super().__init__()
        self.qkv, self.inner = nn.Linear(WIDTH, 3 * WIDTH), inner

    def forward(self, x):
        q, k, v = (split(part) for part in self.qkv(x).chunk(3, -1))
        y = merge(F.scaled_dot_product_attention(q, k, v))
        return (
            y
            if self.inner is None
            else y + (self.inner(y, y, y)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(y))
        )


@pytest.mark.parametrize("inner", [Nested, lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)])
def test_a_call_belongs_to_the_innermost_module(inner):
    plain, x = made(Nested, inner()), inputs(2, 5, WIDTH)
    for layers in (None, [""], ["inner"]):
        model, scales = converted(plain, (x,), layers=layers)
        rest = iter(scales)
        chosen = ["", "inner"] if layers is None else layers
        assert len(scales) == len(chosen)
        with Naive(*((*next(rest), OPEN) if name in chosen else None for name in ("", "inner"))):
            want = plain(x)
        close(model(x), want)
        assert torch.equal(ssmax.revert(model)(x), plain(x))
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_attention_by_hand_is_refused_at_convert_and_later():
    x = inputs(2, 5, WIDTH)
    model = made(Stack, Attention(fused=False))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="nothing to convert: no call of torch"):
        ssmax.convert(model, 0.5, example=(x,))
    assert_untouched(model, before, Attention)
    with pytest.raises(ValueError, match=r"pass example=\(inputs,\)"):
        ssmax.convert(model, 0.5)
    model = made(Stack, Attention())
    ssmax.convert(model, 0.5, example=(x,))
    model(x)
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(ValueError, match="this forward did not call torch's scaled_dot_product_attention"):
        model(x)


@torch.library.custom_op("ssmax_tests::rotate", mutates_args=())
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """An operator of three tensors that does not attend."""
    return x * cos + x.flip(-1) * sin


class Gated(nn.Module):
    """A router and a classifier, which take a softmax or an exp and are no attention, around one that is."""

    def __init__(self):
        super().__init__()
        self.attn, self.router, self.experts = Attention(), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3 * WIDTH)
        self.queries, self.head = nn.Parameter(torch.randn(2, WIDTH)), nn.Linear(2 * WIDTH, 5)

    def forward(self, x):
        x = x + self.attn(x)
        gates = self.router(x).softmax(-1) * self.router(x).exp()
        unit = x / (x * x).sum(-1, keepdim=True).sqrt()
        pooled = (self.router(unit) * gates).sum(1).softmax(-1)  # a masked mean of logits
        similar = (unit @ unit.mT).exp().sum(-1, keepdim=True).log()  # as in contrastive losses
        x = x + rotate(x, similar, similar) * pooled.sum()
        x = (gates.unsqueeze(-1) * self.experts(x).unflatten(-1, (3, WIDTH))).sum(-2)
        pooled = (self.queries @ x.mT).softmax(-1) @ x  # its queries are no tokens
        return F.softmax(self.head(pooled.flatten(-2)), -1)


class Beside(nn.Module):
    """A block whose attention is torch's, and one of another kind."""

    def __init__(self, other):
        super().__init__()
        self.attn, self.other = Attention(), other

    def forward(self, x):
        return self.other(self.attn(x))


@torch.library.custom_op("ssmax_tests::fused_mha", mutates_args=())
def fused_mha(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A kernel whose name says nothing of attention."""
    return F.scaled_dot_product_attention(q, k, v)


class ByHand(nn.Module):
    """Attention in other ways to write it, and by other kernels."""

    def __init__(self, way):
        super().__init__()
        self.qkv, self.way = nn.Linear(WIDTH, 3 * WIDTH), way
        self.temperature, self.bias = nn.Parameter(torch.ones(HEADS, 1, 1)), nn.Parameter(torch.zeros(HEADS, 5, 5))

    def forward(self, x):
        q, k, v = (split(part) for part in self.qkv(x).chunk(3, -1))
        if self.way == "einsum":
            z = torch.einsum("bhnd,bhsd->bhns", q, k) / 2
            z.masked_fill_(~causal(*z.shape[-2:]), -torch.inf)
            y = torch.einsum("bhns,bhsd->bhnd", F.softmax(z.float(), -1), v.float())
        elif self.way == "baddbmm":
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            y = torch.baddbmm(torch.zeros(1, 1, 1).to(q), q, k.mT, alpha=0.5).softmax(-1) @ v
            y = y.unflatten(0, (x.shape[0], -1))
        elif self.way == "addmm":
            y = (torch.addmm(torch.zeros(1).to(q), q[0, 0], k[0, 0].mT).softmax(-1) @ v[0, 0]).expand_as(q)
        elif self.way == "temperature":
            y = (q @ k.mT * self.temperature + self.bias).softmax(-1) @ v
        elif self.way == "exp":
            z = (q @ k.mT / 2).exp()
            y = z / z.sum(-1, keepdim=True) @ v
        elif self.way == "logarithm":
            y = (q @ k.mT / 2).log_softmax(-1).exp() @ v
        elif self.way == "sum":
            y = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1).softmax(-1) @ v
        elif self.way == "operator":
            y = fused_mha(q, k, v)
        elif self.way == "kernel":
            y = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        return merge(y).to(x.dtype)


@pytest.mark.parametrize(
    "way", ["einsum", "baddbmm", "addmm", "temperature", "exp", "logarithm", "sum", "operator", "kernel"]
)
def test_attention_by_hand_beside_what_converts_is_refused(way):
    model, x = made(Beside, ByHand(way)), inputs(2, 5, WIDTH)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"other \(ByHand\) attends without torch.nn.functional.scaled_dot"):
        ssmax.convert(model, 0.5, example=(x,))
    assert_untouched(model, before, Attention)
    assert ssmax.convert(model, 0.5, layers=["attn"], example=(x,)).attn.ssmax
    with pytest.raises(ValueError, match="nothing to convert"):
        ssmax.convert(made(ByHand, way), 0.5, example=(x,))


class InAThread(nn.Module):
    """Runs one of two blocks in another thread, which a trial does not see."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x):
        with ThreadPoolExecutor() as pool:
            return self.first(x) + pool.submit(torch.no_grad()(self.second), x).result()


class Scriptable(nn.Module):
    """Attention that torch.jit.script understands."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("way", ["script", "thread"])
def test_attention_that_a_trial_cannot_see_is_refused(way):
    x = inputs(2, 5, WIDTH)
    if way == "thread":
        model, name, rest = made(InAThread), "second", ["first"]
    else:
        model, name, rest = nn.Sequential(Attention(), torch.jit.script(Scriptable())).double().eval(), "1", ["0"]
    with pytest.raises(ValueError, match=rf"{name} \(.*\) may attend and ran in TorchScript or in another thread"):
        ssmax.convert(model, 0.5, example=(x,))
    ssmax.convert(model, 0.5, example=(x,), layers=rest)
    assert [n for n, _ in model.named_modules() if n.endswith("ssmax")] == [f"{rest[0]}.ssmax"]


def test_attention_that_passes_its_input_on_is_let_be():
    class Maybe(Attention):
        def forward(self, x, on=True):
            return super().forward(x) if on else x

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Maybe(), Maybe()

        def forward(self, x):
            return self.second(self.first(x), False)

    model = ssmax.convert(made(Two), 0.5, example=(inputs(2, 5, WIDTH),))
    assert [name for name, _ in model.named_modules() if name.endswith("ssmax")] == ["first.ssmax"]


def test_grouped_keys_without_a_batch():
    class Unbatched(CrossAttention):
        def forward(self, x):
            q, kv = self.to_q(x).unflatten(-1, (HEADS, -1)), self.to_kv(x).unflatten(-1, (2, self.key_heads, -1))
            q, k, v = (part.transpose(-3, -2) for part in (q, *kv.unbind(-3)))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    x, plain = inputs(5, WIDTH), made(Unbatched)
    model, ((s, b),) = converted(plain, (x,))
    assert s.shape == (HEADS,)
    with Naive((s, b, causal(5, 5))):
        want = plain(x)
    close(model(x), want)


def test_what_takes_a_softmax_and_is_no_attention_is_let_be():
    model = ssmax.convert(made(Gated), 0.5, example=(inputs(2, 5, WIDTH),))
    assert [name for name, _ in model.named_modules() if name.endswith("ssmax")] == ["attn.ssmax"]


def test_attention_that_an_example_does_not_run_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Attention(), Attention()

        def forward(self, x, both=False):
            return self.second(self.first(x)) if both else self.first(x)

    x = inputs(2, 5, WIDTH)
    with pytest.raises(ValueError, match=r"second \(Attention\) did not run in the example"):
        ssmax.convert(made(Half), 0.5, example=(x,))
    assert ssmax.convert(made(Half), 0.5, example=(x, True)).second.ssmax
    assert not hasattr(ssmax.convert(made(Half), 0.5, layers=["first"], example=(x,)).second, "ssmax")


def test_another_kind_of_attention_that_an_example_does_not_run_is_named():
    class Half(Beside):
        def forward(self, x):
            return self.attn(x)

    with pytest.raises(ValueError, match=r"other \(Late\) did not run in the example"):
        ssmax.convert(made(Half, Late()), 0.5, example=(inputs(2, 5, WIDTH),))


class Late(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def attend(q):
    return F.scaled_dot_product_attention(q, q, q)


renamed, partial = F.scaled_dot_product_attention, functools.partial(F.scaled_dot_product_attention, is_causal=True)


class Indirect(nn.Module):
    """Calls attention by a helper, by another name, or with weights of its own."""

    def __init__(self, way):
        super().__init__()
        self.heads = nn.MultiheadAttention(WIDTH, HEADS)
        of_way = {"helper": Indirect.helper, "renamed": Indirect.renamed, "partial": Indirect.partial}
        self.__class__ = type("Way", (nn.Module,), {"forward": of_way.get(way, Indirect.weights)})

    def helper(self, x):
        return attend(x)

    def renamed(self, x):
        return renamed(x, x, x)

    def partial(self, x):
        return [partial(x, x, x) for _ in range(1)]

    def weights(self, x):
        ours = self.heads
        return F.multi_head_attention_forward(x, x, x, WIDTH, HEADS, ours.in_proj_weight, None, None, None, False, 0.0)


@pytest.mark.parametrize("way", ["helper", "renamed", "partial", "weights"])
def test_without_an_example_attention_is_named_however_it_is_called(way):
    with pytest.raises(ValueError, match=r"0 \(Way\) calls attention too"):
        ssmax.convert(nn.Sequential(Indirect(way), nn.MultiheadAttention(WIDTH, HEADS)), 0.5)


@pytest.mark.parametrize("other", [lambda: Attention(), lambda: Attention(fused=False)])
def test_without_an_example_other_attention_is_named(other):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.other = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True), other()

        def forward(self, x):
            return self.other(self.encoder(x))

    with pytest.raises(ValueError, match=r"other \(Attention\) calls attention too.*example="):
        ssmax.convert(made(Both), 0.5)
    assert ssmax.convert(made(Both), 0.5, layers=["encoder.self_attn"]).encoder.self_attn.ssmax


@pytest.mark.parametrize("build", [GPT, lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True)])
@pytest.mark.parametrize(
    "lose", [lambda module: delattr(module, "ssmax"), lambda module: setattr(module, "ssmax", None)]
)
def test_a_scale_that_is_gone_is_missed(build, lose):
    example = (TOKENS,) if build is GPT else (inputs(2, 5, WIDTH),)
    plain = made(build)
    model, _ = converted(plain, example if build is GPT else None)
    lose(next(module for module in model.modules() if "ssmax" in module._modules))
    with pytest.raises(ValueError, match="its scale is gone"):
        model(*example)
    assert torch.equal(ssmax.revert(model)(*example), plain(*example))


def test_lengths_stay_open_in_an_exported_program():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True)
    model = ssmax.convert(made(nn.TransformerEncoder, layer, 1), 0.5)
    sizes = {0: torch.export.Dim("rows", min=2, max=9), 1: torch.export.Dim("tokens", min=2, max=64)}
    program = torch.export.export(model, (inputs(2, 5, WIDTH),), dynamic_shapes=(sizes,))
    x = inputs(3, 11, WIDTH)
    close(program.module()(x), model(x))


def assert_untouched(model, before, *kinds):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(hasattr(module, "ssmax") for module in model.modules())
    assert set(kinds) <= {type(module) for module in model.modules()}


class TwoCounts(nn.Module):
    def forward(self, x):
        q = split(x)
        return merge(F.scaled_dot_product_attention(q, q, q)) + merge(
            F.scaled_dot_product_attention(*[split(x, 2)] * 3)
        )


class Named(nn.Module):
    ssmax = "mine"

    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q)


def with_own_forward():
    model = Sdpa()
    model.forward = lambda q: F.scaled_dot_product_attention(q, q, q)
    return model


QUERY = inputs(1, HEADS, 5, 8)


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (GPT, {"example": (TOKENS,), "init": "matched"}, "needs train_length"),
        (GPT, {"example": (TOKENS,), "init": "matched", "train_length": 1}, "at least 2"),
        (
            GPT,
            {"example": (TOKENS,), "init": "matched", "train_length": 9.5},
            "train_length must be a positive integer",
        ),
        (GPT, {"example": (TOKENS,), "init": "softmax"}, "init must be 'matched', 'identity' or a finite number"),
        (GPT, {"example": (TOKENS,), "init": float("nan")}, "finite number"),
        (GPT, {"example": (TOKENS,), "init": "identity", "bias": False}, "contradicts"),
        (GPT, {"example": (TOKENS,), "layers": ["h.7.attn"]}, r"layers must be some of 'h.0.attn', 'h.1.attn', got"),
        (GPT, {"example": (TOKENS,), "layers": []}, "layers must be some of"),
        (GPT, {"example": (TOKENS,), "layers": [0]}, "layers must be some of"),
        (GPT, {"example": (TOKENS,), "law": "yarn"}, "law and law_parameters are for transformers models"),
        (GPT, {"example": TOKENS}, "example must be a tuple"),
        (GPT, {"example": (TOKENS, 1, 2, 3)}, r"forward failed on the example \(TypeError"),
        (GPT, {"example": (TOKENS + 99,)}, r"forward failed on the example \(IndexError"),
        (TwoCounts, {"example": (inputs(1, 3, WIDTH),)}, r"with \[2, 4\] heads; one scale cannot serve both"),
        (Named, {"example": (QUERY,)}, "has an attribute ssmax already"),
        (with_own_forward, {"example": (QUERY,)}, "has a forward set on the instance"),
        (lambda: nn.Linear(3, 3), {}, "holds no nn.MultiheadAttention; pass example"),
        (lambda: nn.Linear(3, 3), {"example": (torch.ones(1, 3),)}, "Linear has nothing to convert"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(build, options, words):
    model = build()
    before, attributes = copy.deepcopy(model.state_dict()), {name: dict(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=words):
        ssmax.convert(model, **{"init": 0.5, **options})
    assert list(model.state_dict()) == list(before)
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == attributes
    assert not any(type(m).__name__.startswith("SSMax") for m in model.modules())


def test_layers_may_be_any_iterable_of_names():
    build = functools.partial(nn.TransformerEncoderLayer, WIDTH, HEADS, 24, batch_first=True)
    assert ssmax.convert(build(), 0.5, layers=(name for name in ["self_attn"])).self_attn.ssmax
    for layers in (3, "self_attn", [True], [0.0]):
        with pytest.raises(ValueError, match="layers must be a list of names or indices"):
            ssmax.convert(build(), 0.5, layers=layers)
    for option in ("bias", "cross"):
        with pytest.raises(TypeError, match=f"{option} must be True or False, got str"):
            ssmax.convert(build(), 0.5, **{option: "no"})


def test_a_class_that_registers_its_subclasses_is_asked_for_none():
    class Registered(Attention):
        def __init_subclass__(cls, tag):
            raise AssertionError

    model = ssmax.convert(made(Registered), 0.5, example=(inputs(2, 5, WIDTH),))
    assert ssmax.revert(model).__class__ is Registered


def test_one_query_for_a_batch_of_keys_counts_each_rows_own():
    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Parameter(torch.randn(1, HEADS, 3, 8))

        def forward(self, k, seen):
            return F.scaled_dot_product_attention(self.q, k, k, seen)

    k, mask = inputs(2, HEADS, 9, 8), torch.arange(9) < torch.tensor([9, 5])[:, None]
    plain = made(Latents)
    model, scales = converted(plain, (k, mask[:, None, None]), cross=True)
    got = model(k, mask[:, None, None])
    with Naive(*((s, b, mask[:, None, None]) for s, b in scales)):
        close(got, F.scaled_dot_product_attention(plain.q.expand(2, -1, -1, -1), k, k, mask[:, None, None]))
    close(got[1:], model(k[1:, :, :5], None))


def test_heads_folded_into_the_batch_share_a_scale_and_say_so():
    class Folded(Sdpa):
        num_heads = HEADS

    with pytest.warns(UserWarning, match="says that it has 4 heads, and its query has 1"):
        ssmax.convert(Folded(), 0.5, example=(inputs(2 * HEADS, 5, 8),) * 3)


def test_twice_is_refused_and_no_module_is_no_model():
    model = ssmax.convert(GPT(), 0.5, example=(TOKENS,), layers=["h.1.attn"])
    with pytest.raises(ValueError, match="converted already"):
        ssmax.convert(model, 0.5, example=(TOKENS,))
    assert type(ssmax.revert(model).h[1].attn) is CausalSelfAttention
    with pytest.raises(ValueError, match="not a converted model"):
        ssmax.revert(model)
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, got dict"):
        ssmax.convert({}, 0.5)


class Leaving(nn.Module):
    """Leaves traces wherever a forward can: buffers, caches, counters, random states, its input."""

    def __init__(self):
        super().__init__()
        self.attn, self.drop, self.bn = Attention(), nn.Dropout(0.5), nn.BatchNorm1d(WIDTH)
        self.register_buffer("cache", torch.zeros(2, 5, WIDTH, dtype=torch.float64))
        self.calls, self.kept = 0, []

    def forward(self, x):
        self.calls += 1
        self.kept.append(x)
        x += torch.rand(x.shape)
        self.cache.copy_(x)
        return self.bn(self.drop(self.attn(x)).mT)


@pytest.mark.parametrize("training", [True, False])
def test_the_example_leaves_no_trace(training):
    model, x = made(Leaving).train(training), inputs(2, 5, WIDTH)
    model.bn.eval()
    before, given, state = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    ssmax.convert(model, 0.5, example=(x,))
    assert (model.calls, model.kept, model.training, model.bn.training) == (0, [], training, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "forward" not in vars(model.attn)


def test_identity_is_exact_and_revert_is_bit_for_bit():
    for plain, example in ((GPT(), (TOKENS,)), (Stack(Attention()), (torch.randn(2, 5, WIDTH),))):
        plain.eval()
        want, names = plain(*example), list(plain.state_dict())
        with ssmax.converted(plain, "identity", example=example) as model:
            assert model is plain
            assert torch.equal(model(*example), want)
            assert len(model.state_dict()) > len(names)
        assert torch.equal(plain(*example), want)
        assert list(plain.state_dict()) == names
        assert not any(type(m).__name__.startswith("SSMax") for m in plain.modules())


def test_matched_is_the_papers_start():
    model = ssmax.convert(GPT(), train_length=64, example=(TOKENS,))
    scale = model.h[0].attn.ssmax
    assert scale.b is None
    assert scale.s.tolist() == [pytest.approx(ssmax.matched_scale(64))] * HEADS


def test_shared_and_looped_layers_share_a_scale_and_say_so():
    shared = Attention()
    plain, x = made(Stack, shared, shared), inputs(2, 5, WIDTH)
    with pytest.warns(
        UserWarning, match=r"called more than once in a forward, with one scale for all calls: blocks.0.attn$"
    ) as said:
        model, ((s, b),) = converted(plain, (x,))
    assert len(said) == 1
    got = model(x)
    with Naive((s, b, OPEN), (s, b, OPEN)):
        close(got, plain(x))


def test_copies_pickles_and_checkpoints():
    plain = made(GPT)
    model, _ = converted(plain, (TOKENS,))
    want = model(TOKENS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS), want)
        assert type(other.h[0].attn) is type(model.h[0].attn)
        other.h[0].attn.ssmax.s.data.zero_()
        assert torch.equal(model(TOKENS), want)
        assert torch.equal(ssmax.revert(other)(TOKENS), plain(TOKENS))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*h.0.attn.ssmax.weight"):
        copy.deepcopy(plain).load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*h.0.attn.ssmax.weight"):
        model.load_state_dict(plain.state_dict())
    again = ssmax.convert(copy.deepcopy(plain), "identity", example=(TOKENS,))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(TOKENS), want)


def test_a_pickle_loads_in_another_process(tmp_path):
    model, _ = converted(made(GPT), (TOKENS,))
    torch.save((model, TOKENS, model(TOKENS)), tmp_path / "model.pt")
    code = "import sys, torch; model, tokens, want = torch.load(sys.argv[1], weights_only=False); assert torch.equal(model(tokens), want)"
    folder = Path(__file__).parent.parent / "support"
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True, cwd=folder, env=None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("build", "backend"),
    # torch 2.13's aot_eager fails in the backward of the plain second model.
    [(GPT, "aot_eager"), (lambda: Stack(Attention(), Nested(Nested())), "eager")],
)
def test_it_compiles_whole_and_exports(build, backend):
    example = (TOKENS,) if build is GPT else (inputs(2, 9, WIDTH),)
    model, _ = converted(made(build), example)
    want = model(*example)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    close(compiled(*example), want)
    compiled(*example).square().sum().backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(*example).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, atol=1e-9, rtol=1e-9)
    for strict in (False, True):
        program = torch.export.export(model, example, strict=strict)
        close(program.module()(*example), want)


class Unflattened(nn.Module):
    def forward(self, x):
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("build", [Unflattened, lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True)])
def test_it_compiles_once_for_all_inputs_of_a_shape(build):
    model, programs = ssmax.convert(made(build), 0.5, example=(inputs(2, 5, WIDTH),)), []
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: programs.append(graph) or graph)
    for seed in range(3):
        close(compiled(inputs(2, 5, WIDTH, seed=seed)), model(inputs(2, 5, WIDTH, seed=seed)))
    assert len(programs) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_attention_by_hand_raises_too():
    model = ssmax.convert(Stack(Attention()).eval(), 0.5, example=(torch.randn(2, 5, WIDTH),))
    model.blocks[0].attn.fused_attn = False
    torch._dynamo.reset()
    with pytest.raises(Exception, match="did not call torch's scaled_dot_product_attention"):
        torch.compile(model, backend="eager")(torch.randn(2, 5, WIDTH))


def test_scales_stay_float32_and_learn_under_autocast():
    model = ssmax.convert(Stack(Attention()).bfloat16(), "identity", example=(torch.randn(2, 5, WIDTH).bfloat16(),))
    scale = model.blocks[0].attn.ssmax
    assert scale.s.dtype == torch.float32
    assert model.to(torch.float16).blocks[0].attn.ssmax.s.dtype == torch.float32


def test_scales_are_never_decayed():
    model = ssmax.convert(GPT(), "identity", example=(TOKENS,), bias=True)
    model.h[0].attn.ssmax.s.requires_grad_(False)
    groups = ssmax.parameter_groups(model, lr=0.1, weight_decay=0.5, ssmax_lr=0.2)
    held = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        rates = (0.2, 0.0) if "ssmax" in name else (0.1, 0.5 if parameter.ndim > 1 else 0.0)
        assert held.pop(id(parameter), None) == (rates if parameter.requires_grad else None)
    assert not held


def test_a_transformers_model_inside_is_named():
    pytest.importorskip("transformers")
    from tiny_models import tiny_model

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.llm = tiny_model("llama")

    with pytest.raises(
        ValueError, match=r"llm \(LlamaForCausalLM\); convert that one, as in ssmax.convert\(model.llm\)"
    ):
        ssmax.convert(Wrapper(), 0.5, example=(TOKENS,))
    with pytest.raises(ValueError, match="leave it out"):
        ssmax.convert(tiny_model("llama"), 0.5, example=(TOKENS,))


def test_a_plain_module_needs_no_transformers():
    code = (
        "import sys, torch, ssmax\n"
        "model = ssmax.convert(torch.nn.MultiheadAttention(8, 2), 'identity'); x = torch.ones(3, 1, 8); model(x, x, x); ssmax.revert(model)\n"
        "assert not {'transformers', 'torch._dynamo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
