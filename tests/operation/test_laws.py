import math

import pytest
import torch

from ssmax import attention, visible_keys
from ssmax.laws import LAWS, QueryAwareScale
from ssmax.scaling import multiplier, scale_query


@pytest.mark.parametrize(
    ("law", "x", "parameters", "expected"),
    [
        ("softmax", 1000, {}, 1.0),
        ("ssmax", 1000, {"s": 0.43}, 0.43 * math.log(1000)),
        ("ssmax", 1000, {"s": 0.43, "b": 0.2}, 0.43 * math.log(1000) + 0.2),
        ("ssmax", 0, {"s": 0.43, "b": 0.2}, 0.2),
        ("ssmax-fixed", 1000, {}, math.log(1000)),
        ("mistral-large-4", 999, {}, 1.0),
        ("mistral-large-4", 999, {"s": 0.5}, 0.5 * math.log(1000) + 1),
        ("olmo", 1000, {}, math.log(1000)),
        ("llama-4", 8190, {}, 1.0),
        ("llama-4", 8191, {}, 1 + 0.1 * math.log(2)),
        ("llama-4", 81919, {}, 1 + 0.1 * math.log(11)),
        ("ministral-3", 16383, {}, 1.0),
        ("ministral-3", 16384, {}, 1 + 0.1 * math.log(2)),
        ("qwen-1", 2048, {}, 1.0),
        ("qwen-1", 100, {}, 1.0),
        ("qwen-1", 2048**2, {}, 2.0),
        ("qwen-1", 1024**2, {"train_length": 1024}, 2.0),
        ("yarn", 7, {"factor": 4.0}, (0.1 * math.log(4) + 1) ** 2),
    ],
)
def test_the_laws_of_models_in_production(law, x, parameters, expected):
    assert LAWS[law](torch.tensor([x]), **parameters).item() == pytest.approx(expected, rel=1e-6)
    exact = LAWS[law](torch.tensor([x], dtype=torch.float64), **parameters)
    assert exact.dtype == torch.float64
    assert exact.item() == pytest.approx(expected, rel=1e-12)


def test_the_ssmax_law_is_the_librarys_own():
    n = torch.arange(1, 100)
    torch.testing.assert_close(LAWS["ssmax"](n, s=0.3, b=0.1), multiplier(n, 0.3, 0.1, dtype=torch.float32))


def test_a_law_becomes_attention_by_folding_it_into_the_query():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(3))
    n = visible_keys(num_keys=12).double()
    scaled = scale_query(q, LAWS["qwen-1"](n, train_length=4)[:, None])
    got = torch.nn.functional.scaled_dot_product_attention(scaled, k, v, is_causal=True)
    late = attention(q, k, v, 1 / math.log(4), is_causal=True)
    torch.testing.assert_close(got[:, :, 4:], late[:, :, 4:])


@pytest.mark.parametrize("parameters", [{}, {"s": 1.0, "t": 2.0}])
def test_parameters_are_named(parameters):
    with pytest.raises(ValueError, match="takes s, b"):
        LAWS["ssmax"](torch.ones(1), **parameters)


def test_the_query_aware_law():
    torch.manual_seed(0)
    scale = QueryAwareScale(2, 4, hidden_size=8)
    query, n = torch.randn(3, 2, 5, 4), torch.tensor([1, 2, 3, 9, 40])
    base = scale.of_n(n.float().log()[:, None]).reshape(5, 2, 4).transpose(0, 1)
    torch.testing.assert_close(scale(query, n), query * base)
    with torch.no_grad():
        scale.of_query[-1].weight.normal_()
    want = query * base * (1 + torch.tanh(scale.of_query(query)))
    torch.testing.assert_close(scale(query, n), want)
    scale(query, n).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in scale.parameters())
    assert scale(query.bfloat16(), n).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="n must be"):
        scale(query, n[:3])
    with pytest.raises(ValueError, match="query must be"):
        scale(query[:, :1], n)
