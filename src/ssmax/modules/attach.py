"""Classes of converted modules. Conversion changes the class of an instance, not its attributes and parameters."""

import copyreg
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ssmax.modules import attended, multihead, sdpa
from ssmax.modules.code import attending_methods
from ssmax.private import drop_child, hidden_from_modes

# The functions of torch that a scope replaces, each with ours. The first is also torch._C._nn.scaled_dot_product_attention.
CALLS: dict[Any, Callable] = {
    functional.scaled_dot_product_attention: sdpa.attend,
    torch.ops.aten.scaled_dot_product_attention: sdpa.attend,
    torch.ops.aten.scaled_dot_product_attention.default: sdpa.attend,
    functional.multi_head_attention_forward: multihead.attend,
}


class AttentionScope(TorchFunctionMode):
    """Scale the attention calls inside the block.

    Args:
        scale: an SSMaxScale. None leaves the calls as they are, and hides them from outer scopes.
        of_forward: refuse calls without gradients inside a block with gradients.

    Attributes:
        calls: number of attention calls so far.
    """

    def __init__(self, scale: nn.Module | None, of_forward: bool = True):
        super().__init__()
        self.scale, self.calls = scale, 0
        self.learns = of_forward and torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in CALLS:  # torch.compile cannot trace Tensor.unflatten here
            return (torch.unflatten if func is Tensor.unflatten else func)(*args, **kwargs)
        self.calls += 1
        if self.scale is None:
            with hidden_from_modes():
                return func(*args, **kwargs)
        if self.learns and not torch.is_grad_enabled():
            raise ValueError(
                "attention runs without gradients inside a forward with gradients (activation checkpointing of a part of the module?); what "
                "is computed again would not be scaled. Checkpoint the whole module, or call it under torch.no_grad"
            )
        return CALLS[func](self.scale, *args, **kwargs)


class Changed:
    """Base of all changed classes. An instance is pickled and copied as its own class, and then changed again."""

    ssmax_kind: type["Changed"]
    ssmax_base: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "ssmax_base" not in vars(cls):  # the base may register its subclasses
            super().__init_subclass__(**kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, arguments, *rest = super().__reduce_ex__(protocol)
        if type(self) is not changed_class(self.ssmax_kind, self.ssmax_base):
            return (make, arguments, *rest)
        if make is copyreg.__newobj__:  # pyrefly: ignore[missing-attribute]
            arguments = (self.ssmax_base, *arguments[1:])
        return (_rebuild, (self.ssmax_kind, make, arguments), *rest)


class _Watched(Changed):
    """A module with a scale. Each call checks that the scale was used, also if another function replaced the forward."""

    ssmax: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; raise ValueError if its scale was not used."""
        output = super().__call__(*args, **kwargs)  # pyrefly: ignore[missing-attribute]
        attended.require(self, args, output)
        return output


class Scoped(_Watched):
    """A module that calls attention in its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, with its calls of attention scaled.

        Raises:
            ValueError: the forward made no such call, so that its attention was plain softmax.
        """
        scope, before = AttentionScope(_scale_of(self)), attended.enter(self)
        try:
            with scope:
                output = super().forward(*args, **kwargs)  # pyrefly: ignore[missing-attribute]
        finally:
            attended.enter(before)
        if not scope.calls:
            raise ValueError(
                f"{self.ssmax_base.__name__} was converted to SSMax, but this forward did not call torch's "
                "scaled_dot_product_attention, so it was plain softmax. Turn its fused attention on "
                "(timm: fused_attn, x-transformers: flash), or call ssmax.revert(model)"
            )
        attended.note(self)
        return output


class Unscaled(Changed):
    """A module that is not converted but runs inside a converted one: its own attention calls are not scaled."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        with AttentionScope(None):
            return super().forward(*args, **kwargs)  # pyrefly: ignore[missing-attribute]


class _NoFastPath:
    """Keeps nn.TransformerEncoderLayer from its fused kernel, which would read the weights and not call forward."""

    _qkv_same_embed_dim = property(lambda self: False, lambda self, value: None)


class Multihead(_NoFastPath, _Watched):
    """nn.MultiheadAttention with a scale."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend like nn.MultiheadAttention, with SSMax; same arguments, shapes and results."""
        turned = self.batch_first and query.ndim == 3 and not query.is_nested
        if turned:
            first = query.transpose(0, 1)  # self-attention stays one tensor; torch.compile guards on id()
            second = first if key is query else key.transpose(0, 1)
            value = second if value is key else first if value is query else value.transpose(0, 1)
            query, key = first, second
        output, weights = multihead.attend(
            _scale_of(self),
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        attended.note(self)
        return output.transpose(0, 1) if turned else output, weights


class ScopedMultihead(_NoFastPath, Scoped):
    """A subclass of nn.MultiheadAttention with a forward of its own."""


class PaddedEncoder(Changed):
    """nn.TransformerEncoder that passes padded tensors and masks to its layers, never nested tensors."""

    use_nested_tensor = property(lambda self: False, lambda self, value: None)


@functools.cache
def changed_class(kind: type[Changed], base: type[nn.Module]) -> type[Any]:
    """Return the class of changed instances of base. It is made on demand; instances are pickled with _rebuild."""
    attributes = {"ssmax_kind": kind, "ssmax_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    changed = type(f"SSMax{base.__name__}", (kind, base), attributes)
    for name, method in attending_methods(base).items() if issubclass(kind, _Watched) else ():
        setattr(changed, name, _scaled(changed, name, method))
    return changed


def _scaled(changed, name, method):
    """Return a method that attends, with its calls of attention scaled also if something other than the forward calls it."""

    @functools.wraps(method)
    def scaled(self, *args, **kwargs):
        own = getattr(super(changed, self), name)  # it may have been patched since
        if attended.runs(self):
            return own(*args, **kwargs)
        with AttentionScope(_scale_of(self), of_forward=False):
            return own(*args, **kwargs)

    return scaled


def change(module: nn.Module, kind: type[Changed]) -> nn.Module:
    """Change the class of a module to one of the given kind, in place, and return the module."""
    module.__class__ = changed_class(kind, type(module))
    return module


def restore(module: Any) -> None:
    """Give a changed module its own class again, and remove its scale.

    Raises:
        ValueError: something else has changed the class since.
    """
    if type(module) is not changed_class(module.ssmax_kind, module.ssmax_base):
        raise ValueError(
            f"the class of a converted module was changed to {type(module).__name__} (by sharding or parametrisation); undo that first"
        )
    drop_child(module, "ssmax")
    module.__class__ = module.ssmax_base


def _scale_of(module):
    scale = getattr(module, "ssmax", None)
    if scale is None:
        raise ValueError(
            f"{module.ssmax_base.__name__} was converted to SSMax and its scale is gone: it would be plain softmax. "
            "Call ssmax.revert(model) to remove SSMax from the model"
        )
    return scale


def _rebuild(kind, make, arguments):
    """Make the instance as its own class does, then change it."""
    return change(make(*arguments), kind)
