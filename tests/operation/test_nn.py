import copy
import io
import math
import pickle

import pytest
import torch

from ssmax import SSMaxScale, matched_scale


def test_it_scales_each_row_and_head():
    scale = SSMaxScale(2, s=0.4, bias=True, b=0.1)
    with torch.no_grad():
        scale.weight.copy_(torch.tensor([0.4, 0.8]))
    query = torch.randn(3, 2, 4, 5)
    n = torch.tensor([1, 2, 3, 9])
    want = query * (torch.tensor([[0.4], [0.8]]) * n.log() + 0.1)[None, :, :, None]
    torch.testing.assert_close(scale(query, n), want)
    torch.testing.assert_close(scale(query, n.expand(3, 4)), want)
    torch.testing.assert_close(scale(query, 9)[:, 1, 0], query[:, 1, 0] * (0.8 * math.log(9) + 0.1))


def test_a_shared_scale_is_one_for_all_heads_and_one_module_serves_all_layers():
    scale = SSMaxScale(4, s=0.3, bias=True, b=0.2, shared=True)
    query, n = torch.randn(2, 4, 3, 5), torch.tensor([1, 2, 7])
    assert [p.shape for p in scale.parameters()] == [(1,), (1,)]
    torch.testing.assert_close(scale(query, n), query * (0.3 * n.log() + 0.2)[:, None])
    layers = torch.nn.ModuleList([torch.nn.ModuleDict({"ssmax": scale}) for _ in range(3)])
    assert len(list(layers.parameters())) == 2


def test_default_is_the_papers_start():
    assert SSMaxScale(1).s.item() == pytest.approx(0.16847, abs=5e-6)
    assert SSMaxScale(1, s=matched_scale(64)).s.item() == pytest.approx(64 / math.lgamma(65))


def survive_state_dict(scale):
    fresh = SSMaxScale(3, bias=True)
    fresh.load_state_dict(scale.state_dict())
    return fresh


def survive_file(scale):
    file = io.BytesIO()
    torch.save(scale.state_dict(), file)
    file.seek(0)
    fresh = SSMaxScale(3, bias=True)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "trip",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half().float(),
        lambda m: torch.nn.Sequential(m).bfloat16()[0],
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        survive_state_dict,
        survive_file,
    ],
)
def test_s_and_b_survive_bit_for_bit(trip):
    scale = SSMaxScale(3, s=1 / 3, bias=True, b=1 / 7)
    before = [p.detach().clone() for p in scale.parameters()]
    after = trip(scale)
    assert [p.dtype for p in after.parameters()] == [torch.float32] * 2
    assert all(torch.equal(x, y) for x, y in zip(before, after.parameters(), strict=True))
    assert all(p.requires_grad for p in after.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_in_a_state_dict_changes_nothing_however_it_is_loaded(dtype):
    for assign in (False, True):
        scale = SSMaxScale(3)
        scale.load_state_dict({"weight": torch.full((3,), 0.5, dtype=dtype)}, assign=assign)
        assert scale.s.dtype == torch.float32
        wide = SSMaxScale(3).double()
        wide.load_state_dict({"weight": torch.full((3,), 0.5, dtype=dtype)}, assign=assign)
        assert wide.s.dtype == torch.float64


def test_only_double_widens_and_float_goes_back():
    assert SSMaxScale(2).double().weight.dtype == torch.float64
    for back in (lambda m: m.float(), lambda m: m.half(), lambda m: m.bfloat16()):
        assert back(SSMaxScale(2, s=1 / 3).double()).weight.dtype == torch.float32


def test_s_keeps_learning_under_bfloat16():
    scale = SSMaxScale(1, s=1.0).to(torch.bfloat16)
    optimizer = torch.optim.SGD(scale.parameters(), lr=1e-3)
    query = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    for _ in range(1000):
        optimizer.zero_grad()
        (scale(query, 3).float().sum() / math.log(3)).backward()
        optimizer.step()
    assert scale.s.item() == pytest.approx(0.0, abs=2e-3)


def test_meta_device_construction():
    with torch.device("meta"):
        scale = SSMaxScale(4, s=0.7)
    scale.to_empty(device="cpu")
    scale.reset_parameters()
    assert scale.s.tolist() == pytest.approx([0.7] * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_multiplier_wide(dtype):
    scale = SSMaxScale(1, s=0.43)
    query = torch.full((1, 1, 1, 1), 1.0, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = scale(query, 1001)
    assert got.dtype == dtype
    assert got.item() == pytest.approx(0.43 * math.log(1001), rel=2**-9 if dtype == torch.bfloat16 else 1e-6)


def test_inference_first_then_training():
    scale = SSMaxScale(1)
    with torch.inference_mode():
        scale(torch.ones(1, 1, 2, 4), torch.tensor([1, 2]))
    scale(torch.ones(1, 1, 2, 4), torch.tensor([1, 2])).sum().backward()
    assert scale.weight.grad.item() == pytest.approx(4 * math.log(2))


def test_wrong_types():
    with pytest.raises(TypeError, match="floating point"):
        SSMaxScale(2)(torch.full((1, 2, 1, 2), 7), 9)
    with pytest.raises(TypeError, match="n must be"):
        SSMaxScale(2)(torch.ones(1, 2, 1, 2), None)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SSMaxScale(0), "positive integer"),
        (lambda: SSMaxScale(2, b=0.5), "needs bias=True"),
        (lambda: SSMaxScale(2)(torch.ones(1, 3, 4, 5), 4), "2 heads"),
        (lambda: SSMaxScale(2)(torch.ones(2, 4, 5), 4), r"query must be \(B, 2 heads"),
        (lambda: SSMaxScale(2)(torch.ones(1, 2, 4, 5), torch.ones(3)), "n must be"),
    ],
)
def test_bad_calls(call, words):
    with pytest.raises(ValueError, match=words):
        call()
