"""What ssmax relies on of torch's private names (ssmax/private.py): each test fails if one is gone."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch import distributed, nn
from torch.overrides import TorchFunctionMode

from ssmax import private


class Names(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_modes_do_not_see_what_is_hidden():
    x = torch.ones(2, 2)
    with Names() as names:
        torch.sin(x)
        with private.hidden_from_modes():
            torch.cos(x)
    assert names.seen == ["sin"]


def test_softmax_has_five_names():
    x = torch.ones(2, 2)
    with Names() as names:
        x.softmax(-1), torch.softmax(x, -1), nn.functional.softmax(x, -1), torch._softmax(x, -1, False)
        torch._safe_softmax(x, -1), torch.special.softmax(x, -1), nn.functional.softmin(x, -1)
    assert set(names.seen) >= private.SOFTMAX_CALLS
    assert len(names.seen) >= 7


def test_the_compiler_is_loaded_when_it_is_used():
    program = """
import torch
from ssmax.private import compiler_is_loaded
before = compiler_is_loaded()
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
print(before, compiler_is_loaded())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "True"


def test_a_module_has_children_and_hooks():
    module = nn.Sequential(nn.Identity())
    private.drop_child(module, "0")
    private.drop_child(module, "0")
    assert list(module.children()) == []
    assert not private.has_hooks(module)
    before = module.register_forward_pre_hook(lambda *_: None)
    assert private.has_hooks(module)
    before.remove()
    module.register_forward_hook(lambda *_: None)
    assert private.has_hooks(module)


def test_int8_matrices_multiply_into_int32():
    a, b = torch.randint(-9, 9, (32, 16), dtype=torch.int8), torch.randint(-9, 9, (24, 16), dtype=torch.int8)
    out = torch.empty(32, 24, dtype=torch.int32)
    private.int8_matmul(a, b.t(), out)
    assert torch.equal(out, a.int() @ b.int().t())


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_on_the_cpu_returns_the_log_sum(causal):
    query, key, value = torch.randn(3, 1, 2, 5, 16)
    z = 0.3 * query @ key.mT
    z = z.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf) if causal else z
    output, log_sum = private.flash_with_log_sum(query, key, value, causal, 0.3)
    torch.testing.assert_close(output, z.softmax(-1) @ value)
    torch.testing.assert_close(log_sum, z.logsumexp(-1))


def test_fsdp_groups_name_their_parameters_and_modules():
    arguments = inspect.signature(private.fsdp_parameter_group().__init__).parameters
    assert {"params", "modules", "mesh_info", "mp_policy", "offload_policy"} <= set(arguments)


def test_ranks_share_a_store(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        store = private.default_store()
        store.set("a word", "said")
        assert store.get("a word") == b"said"
        assert store.check(["a word"])
    finally:
        distributed.destroy_process_group()


def test_what_queryscale_overrides_is_called():
    assert "module._apply(" in inspect.getsource(nn.Module._apply)
    assert "fn" in inspect.signature(nn.Module._apply).parameters
    assert list(inspect.signature(nn.Module._load_from_state_dict).parameters)[1:3] == ["state_dict", "prefix"]


def test_a_hook_has_a_name():
    calls, module = [], nn.Linear(2, 2)
    private.set_hook(module, "mine", lambda *given: calls.append(given))
    x = torch.ones(1, 2)
    output = module(x)
    assert calls == [(module, (x,), output)]
    private.drop_hook(module, "mine")
    private.drop_hook(module, "mine")
    module(x)
    assert len(calls) == 1
    assert not private.has_hooks(module)


def test_what_vmap_runs_over_is_batched():
    found = []
    torch.func.vmap(lambda x: (found.append(private.is_batched(x)), x)[1])(torch.ones(2, 2))
    assert found == [True]
    assert not private.is_batched(torch.ones(2))
