"""All private names of torch that ssmax uses. tests/operation/test_torch_private.py tests what ssmax relies on.

Overridden methods are in their classes: _apply and _load_from_state_dict of QueryScale.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Names under which a softmax reaches a TorchFunctionMode.
SOFTMAX_CALLS = {"softmax", "_softmax", "_safe_softmax", "special_softmax", "softmin"}


def hidden_from_modes() -> Any:
    """Return a context in which no TorchFunctionMode sees the calls."""
    return torch._C.DisableTorchFunction()


def saved_name(name: str) -> str:
    """Return the name of a module, without those of torch's wrappers around it, as in a state_dict that is saved."""
    wrappers = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
    return ".".join(part for part in name.split(".") if part not in wrappers)


def compiler_is_loaded() -> bool:
    """Return whether torch.compile was used in this process; loading it takes seconds."""
    return "torch._dynamo" in sys.modules


def get_inside(module: nn.Module, path: Iterable[str]) -> tuple[nn.Module, int]:
    """Follow names of submodules, quicker than getattr. Return the last one that is there, and how many names led to it."""
    found, depth = module, 0
    for name in path:
        inside = found._modules.get(name)
        if inside is None:
            inside = getattr(found, name, None)  # through a wrapper, such as FSDP's
        if inside is None:
            break
        found, depth = inside, depth + 1
    return found, depth


def drop_child(module: nn.Module, name: str) -> None:
    """Remove a submodule, if the module has it."""
    module._modules.pop(name, None)


def set_hook(module: Any, name: str, hook: Any) -> None:
    """Run hook(module, inputs, output) after each forward of the module; by its name, copies can drop it too."""
    module._forward_hooks[name] = hook


def drop_hook(module: Any, name: str) -> None:
    """Remove a hook that set_hook added, if the module has it."""
    module._forward_hooks.pop(name, None)


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks run before or after the module's forward."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def base_of(view: Tensor) -> Tensor | None:
    """Return the tensor whose memory a view shares, or None."""
    return view._base


def is_batched(tensor: Tensor) -> bool:
    """Return whether torch.func.vmap runs over a dimension of the tensor, so that its values cannot be read."""
    return torch._C._functorch.is_batchedtensor(tensor)


def int8_matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write the product of int8 matrices into out, int32. Whether it is exact depends on the machine."""
    torch._int_mm(a, b, out=out)


def flash_with_log_sum(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Any:
    """Return flash attention on the CPU, and the log-sum-exp of each row's logits."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def default_store() -> Any:
    """Return the key-value store by which the ranks found one another; it outlives them."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def fsdp_parameter_group() -> Any:
    """Return the class of FSDP2's parameter groups: its arguments are params, modules, mesh_info, mp_policy, offload_policy ..."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    return FSDPParamGroup
