"""Laws of n that learn something, against their formulas in numpy's float64: modules first, then converted models."""

import math

import numpy as np
import oracle
import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import ssmax
from ssmax.laws import LAWS, LawScale, QueryAwareScale, make_scale, matched_start
from ssmax.modules.whole import scale_parameters

LEARNED = ("ssmax-power", "temperature", "query-aware")
PARAMETERS = {"ssmax-power": {"s": 0.4, "gamma": 1.0}, "temperature": {}, "query-aware": {"s": 0.4, "hidden_size": 5}}
HEADS, SIZE = 4, 8
erf = np.vectorize(math.erf)


def spread(module):
    """Different numbers in every head and unit, far from the start; s, gamma and t stay positive."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in scale_parameters(module):
            parameter.copy_(0.3 + 0.6 * torch.rand(parameter.shape, generator=generator))
    return module


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def network(parts, name, x):
    hidden = gelu(x @ parts[f"{name}.0.weight"].T + parts[f"{name}.0.bias"])
    return hidden @ parts[f"{name}.2.weight"].T + parts[f"{name}.2.bias"]


def multiplier(law, parts, q, n):
    """What multiplies the query q (D,) of head h that sees n keys; parts are the module's parameters in float64."""
    count = max(n, 1)

    def at(h):
        if law == "temperature":
            return parts["t"][h]
        if law == "ssmax-power":  # with one key its weight is 1 whatever multiplies; the law says 0
            return parts["s"][h] * math.log(count) ** parts["gamma"][h] if count > 1 else 0.0
        base = network(parts, "of_n", np.array([math.log(count)])).reshape(HEADS, SIZE)[h]
        return base * (1 + np.tanh(network(parts, "of_query", q)))

    return at


def expected(law, scale, query, n_BHN):
    parts = {name: p.detach().double().numpy() for name, p in scale.named_parameters()}
    want = np.zeros(query.shape)
    for i, h, r in np.ndindex(*query.shape[:3]):
        want[i, h, r] = query[i, h, r] * multiplier(law, parts, query[i, h, r], n_BHN[i, h, r])(h)
    return want


# n as the layouts of visible_keys give it; each is one number for a batch, rows, rows of a batch, or rows of a head.
LAYOUTS = {
    "decode": 37,
    "causal": torch.arange(1, 7),
    "left padding": torch.tensor([[0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]),
    "right padding": torch.tensor([[1, 2, 3, 3, 3, 3], [1, 2, 3, 4, 5, 6]]),
    "packed": ssmax.visible_keys(cu_seqlens=torch.tensor([0, 2, 6])),
    "window": ssmax.visible_keys(num_keys=6, window=3),
    "heads": torch.arange(1, 49).view(2, 4, 6) * 1000,
}


@pytest.mark.parametrize("law", LEARNED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_learned_law_is_its_formula_with_its_gradients(law, layout):
    torch.manual_seed(0)
    scale = spread(make_scale(law, HEADS, SIZE, **PARAMETERS[law]))
    query = torch.randn(2, HEADS, 6, SIZE, dtype=torch.float64, requires_grad=True)
    n = LAYOUTS[layout]
    n_BHN = torch.as_tensor(n)[:, None] if torch.as_tensor(n).ndim == 2 else torch.as_tensor(n)
    n_BHN = n_BHN.expand(2, HEADS, 6).numpy()
    want = expected(law, scale, query.detach().numpy(), n_BHN)
    np.testing.assert_allclose(scale(query, n).detach().numpy(), want, rtol=1e-10, atol=1e-12)
    # Gradients: of the sum over probes, by central differences of the formula.
    probe = torch.randn(query.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (scale(query, n) * probe).sum().backward()
    step = 1e-4

    def slope(change):
        change(step)
        up = (expected(law, scale, query.detach().numpy(), n_BHN) * probe.numpy()).sum()
        change(-2 * step)
        down = (expected(law, scale, query.detach().numpy(), n_BHN) * probe.numpy()).sum()
        change(step)
        return (up - down) / (2 * step)

    scale.double()
    for parameter in (*scale.parameters(), query):
        flat = parameter.detach().view(-1)
        for at in (0, flat.numel() - 1):
            got = parameter.grad.view(-1)[at].item()
            assert got == pytest.approx(slope(lambda d, x=flat, i=at: x[i].add_(d)), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_one_key_has_finite_gradients_whatever_the_exponent_is(gamma):
    scale = LawScale("ssmax-power", 2, s=0.5, gamma=gamma)
    query = torch.randn(1, 2, 3, 4, requires_grad=True)
    scale(query, torch.tensor([0, 1, 1])).sum().backward()
    assert scale.s.grad.tolist() == scale.gamma.grad.tolist() == [0.0, 0.0]
    assert query.grad.eq(0).all()
    scale(query, torch.tensor([1, 2, 9])).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in scale.parameters())


def test_they_start_where_they_say():
    query, n = torch.randn(2, HEADS, 6, SIZE, dtype=torch.float64), torch.arange(1, 7)
    want = ssmax.SSMaxScale(HEADS, s=0.4)(query, n)
    for law in ("ssmax-power", "query-aware"):
        torch.testing.assert_close(
            make_scale(law, HEADS, SIZE, **PARAMETERS[law])(query, n), want, rtol=1e-6, atol=1e-7
        )
    assert torch.equal(make_scale("temperature", HEADS, SIZE)(query, n), query)
    softmax = QueryAwareScale(HEADS, SIZE, s=0.0, b=1.0)
    assert torch.equal(softmax(query, n), query)
    assert matched_start("ssmax-power", 128, gamma=1.0) == pytest.approx(ssmax.matched_scale(128), rel=1e-12)
    m = LAWS["ssmax-power"](torch.arange(1, 129).double(), s=matched_start("ssmax-power", 128, gamma=0.5), gamma=0.5)
    assert m.mean().item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("law", LEARNED)
def test_float32_stays_and_narrow_queries_are_rounded_once(law):
    scale = spread(make_scale(law, HEADS, SIZE, **PARAMETERS[law])).bfloat16()
    assert {p.dtype for p in scale.parameters()} == {torch.float32}
    query, n = torch.randn(1, HEADS, 6, SIZE, dtype=torch.bfloat16), torch.arange(1, 7)
    exact = scale(query.double(), n)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = scale(query, n)
    assert got.dtype == torch.bfloat16
    # One rounding to bfloat16, and float32's in between, which are far smaller.
    assert ((got.double() - exact).abs() <= 2**-8 * 1.01 * exact.abs() + 1e-30).all()
    for assign in (False, True):
        fresh = make_scale(law, HEADS, SIZE, **PARAMETERS[law])
        narrow = {name: p.bfloat16() for name, p in scale.state_dict().items()}
        fresh.load_state_dict(narrow, assign=assign)
        assert {p.dtype for p in fresh.parameters()} == {torch.float32}


@pytest.mark.parametrize("law", LEARNED)
def test_they_are_not_decayed(law):
    model = ssmax.convert(tiny_model("llama"), law=law)
    scales = {id(p) for p in scale_parameters(model)}
    assert scales
    for group in ssmax.parameter_groups(model, lr=1e-3, weight_decay=0.1, ssmax_lr=1e-2):
        inside = {id(p) in scales for p in group["params"]}
        assert len(inside) == 1
        assert inside != {True} or (group["weight_decay"], group["lr"]) == (0.0, 1e-2)


TOKENS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, **inputs):
    return model(**{"input_ids": TOKENS, **inputs}).logits


@pytest.mark.parametrize("law", LEARNED)
def test_they_convert_save_load_and_revert(law, tmp_path):
    model = tiny_model("llama")
    plain, kind = logits(model), type(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    spread(ssmax.convert(model, law=law, law_parameters={"hidden_size": 6} if law == "query-aware" else None))
    want = logits(model)
    assert (want - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.ssmax["law"] == law
    assert torch.equal(logits(loaded), want)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in scale_parameters(narrow)} == {torch.float32} != {narrow.dtype}
    with pytest.raises(ValueError, match="and fold takes s log n alone"):
        ssmax.fold(loaded)
    with pytest.raises(ValueError, match=r"trained as a whole; calibrate fits s log n \+ b"):
        ssmax.calibrate(loaded, TOKENS.repeat(1, 8), length=16)
    assert type(ssmax.revert(loaded)) is kind
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in loaded.state_dict().items())


@pytest.mark.parametrize("law", LEARNED)
def test_a_padded_row_is_the_row_alone(law):
    model = spread(ssmax.convert(tiny_model("llama").double(), law=law))
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    # Its own positions: RoPE's angles are float32 and differ where a row is shifted.
    padded = logits(model, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for row, first in ((0, 5), (1, 0)):
        alone = model(TOKENS[row : row + 1, first:]).logits
        torch.testing.assert_close(padded[row, first:], alone[0], rtol=1e-9, atol=1e-9)
    cached = model.generate(TOKENS, attention_mask=mask, max_new_tokens=6, do_sample=False)
    whole = model.generate(TOKENS, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("law", LEARNED)
def test_training_moves_what_is_learned(law):
    model = ssmax.convert(tiny_model("llama"), law=law).train()
    before = [p.detach().clone() for p in scale_parameters(model)]
    optimizer = torch.optim.AdamW(ssmax.parameter_groups(model, lr=1e-2, weight_decay=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    for p, old in zip(scale_parameters(model), before, strict=True):
        assert p.isfinite().all()
        assert (p - old).abs().max() > 1e-3


def test_query_awareness_and_a_softcap_exclude_each_other():
    model = ssmax.convert(tiny_model("gemma2"), law="query-aware")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="cannot come after a softcap"):
        model(TOKENS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"law": "ssmax-power", "init": "identity"}, "'ssmax-power' starts from law_parameters; init and bias belong"),
        ({"law": "temperature", "law_parameters": {"s": 1.0}}, "takes t; it does not take s"),
        ({"law": "ssmax-power", "law_parameters": {"gamma": math.nan}}, "finite numbers, got gamma = nan"),
        (
            {"law": "qwen-1", "law_parameters": {"train_length": 1}},
            "not a finite number for every n up to 2.40 with train_length",
        ),
        (
            {"law": "llama-4", "law_parameters": {"floor": 0}},
            "not a finite number for every n up to 2.40 with scale = 0.1, floor = 0",
        ),
        (
            {"law": "yarn", "law_parameters": {"factor": 0}},
            "not a finite number for every n up to 2.40 with factor = 0",
        ),
        ({"law": "query-aware", "law_parameters": {"hidden_size": 10**12}}, "hidden_size 2 to 65536, got 10000"),
        ({"law": "query-aware", "law_parameters": {"hidden_size": 1}}, "hidden_size 2 to 65536, got 1"),
        ({"law": "query-aware", "law_parameters": {"hidden_size": 2.5}}, "got 2.5"),
        ({"law": "query-aware", "law_parameters": {"s": math.inf}}, "finite numbers, got inf"),
        ({"law": "sharpest"}, "law must be ssmax, .*temperature.*; got 'sharpest'"),
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(options, words):
    model = tiny_model("llama")
    kind, names = type(model), model.state_dict().keys()
    with pytest.raises(ValueError, match=words):
        ssmax.convert(model, **options)
    assert type(model) is kind
    assert model.state_dict().keys() == names
    assert not hasattr(model.config, "ssmax")


@pytest.mark.parametrize("law", LEARNED)
def test_attention_with_a_learned_law_is_attention_with_the_formula(law):
    """Through torch's kernel, against the oracle's softmax of the scaled logits."""
    torch.manual_seed(0)
    scale = spread(make_scale(law, HEADS, SIZE, **PARAMETERS[law]))
    q, k, v = (torch.randn(1, HEADS, 5, SIZE, dtype=torch.float64) for _ in range(3))
    got = torch.nn.functional.scaled_dot_product_attention(scale(q, torch.arange(1, 6)), k, v, is_causal=True)
    n = np.broadcast_to(np.arange(1, 6), (1, HEADS, 5))
    scaled = expected(law, scale, q.numpy(), n)
    open_keys = np.broadcast_to(oracle.causal(5, 5), (1, HEADS, 5, 5))
    one = np.ones(HEADS)
    want = oracle.attention(scaled, k.numpy(), v.numpy(), 0 * one, one, open_keys)
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-9, atol=1e-12)
