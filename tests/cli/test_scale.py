"""Context parallelism, simulated: ring and Ulysses equal one device, send what the formulae say, and fail on local n."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from ssmax import SSMaxScale, attention
from ssmax.bench.scale import Shape

PATH = Path(__file__).parents[2] / "examples" / "context_parallel.py"
SPEC = importlib.util.spec_from_file_location("context_parallel", PATH)
assert SPEC is not None
assert SPEC.loader is not None
parallel = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(parallel)

HEADS, TOKENS, SIZE = 4, 24, 8


def run(method, ranks):
    """Output, gradients of q, k, v and s, and bytes sent by one rank; the same of one device first."""
    torch.manual_seed(0)
    whole = [torch.randn(2, HEADS, TOKENS, SIZE, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    scale = SSMaxScale(HEADS).double()
    upstream = torch.randn(2, HEADS, TOKENS, SIZE, dtype=torch.float64)
    want = attention(*whole, scale.s, is_causal=True, impl="reference")
    one = [want, *torch.autograd.grad((want * upstream).sum(), [*whole, scale.s])]
    own = [copy.deepcopy(scale) for _ in range(ranks)]
    parts = [[x.detach().clone().requires_grad_() for x in tensor.chunk(ranks, 2)] for tensor in whole]
    outputs, sent = method(*parts, own)
    got = torch.cat(outputs, 2)
    (got * upstream).sum().backward()
    return one, [got, *(torch.cat([x.grad for x in part], 2) for part in parts), parallel.all_reduce(own)], sent


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["ring", "ulysses"])
def test_split_over_ranks_it_equals_one_device_and_sends_what_the_formula_says(name, ranks):
    one, many, sent = run(getattr(parallel, name), ranks)
    for want, got in zip(one, many, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    shape = Shape(layers=1, heads=HEADS, key_heads=HEADS, size=SIZE, number=8)
    assert sent == 2 * getattr(shape, f"{name}_bytes")(TOKENS, ranks)  # 2 sequences


def test_local_positions_and_gradients_that_are_not_summed_are_wrong(monkeypatch):
    local = parallel.visible_keys
    monkeypatch.setattr(parallel, "visible_keys", lambda position_ids: local(position_ids=position_ids % (TOKENS // 2)))
    one, many, _ = run(parallel.ring, 2)
    assert (one[0] - many[0]).abs().max() > 1e-3
    monkeypatch.undo()
    monkeypatch.setattr(parallel, "all_reduce", lambda scales: scales[0].s.grad)
    one, many, _ = run(parallel.ring, 2)
    assert (one[-1] - many[-1]).abs().max() > 1e-3
