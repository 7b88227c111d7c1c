"""A converted module whose forward was replaced raises: what replaced it computes plain softmax."""

import functools
import threading
import types

import pytest
import torch
from attention_modules import HEADS, WIDTH, Attention, Stack, merge, split
from module_checks import close, converted, inputs, made
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import ssmax

X = inputs(2, 5, WIDTH)


def fused(self, x):
    return self.proj(merge(scaled_dot_product_attention(*(split(part) for part in self.qkv(x).chunk(3, -1)))))


def by_hand(self, query, key, value, **kwargs):
    return query, None


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True), 2)


CASES = {
    "module": (lambda: Stack(Attention(), Attention()), (X,), "blocks.1.attn", fused),
    "multihead": (encoder, None, "layers.1.self_attn", by_hand),
}
parametrized = pytest.mark.parametrize("case", CASES)


@parametrized
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_set_on_the_instance_raises(case, compiled, grad):
    build, example, name, patch = CASES[case]
    model = ssmax.convert(made(build), 0.5, example=example)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with torch.set_grad_enabled(grad):
        want = run(X)
        module = model.get_submodule(name)
        module.forward = types.MethodType(patch, module)
        for _ in range(2):
            with pytest.raises(Exception if compiled else ValueError, match="did not use its scale"):
                run(X)
        del module.forward
        close(run(X), want)


@parametrized
def test_a_forward_that_is_wrapped_and_called_is_let_be(case):
    build, example, name, _ = CASES[case]
    model, _ = converted(made(build), example)
    want = model(X)
    module = model.get_submodule(name)
    module.forward = functools.update_wrapper(functools.partial(module.forward), module.forward)
    close(model(X), want)


@parametrized
def test_revert_takes_the_watch_off(case):
    build, example, name, patch = CASES[case]
    model = ssmax.revert(ssmax.convert(made(build), 0.5, example=example))
    assert not any(module._forward_hooks for module in model.modules())
    module = model.get_submodule(name)
    module.forward = types.MethodType(patch, module)
    assert model(X).isfinite().all()


@parametrized
def test_threads_do_not_disturb_one_another(case):
    build, example, _, _ = CASES[case]
    model, _ = converted(made(build), example)
    wants, failed = [model(inputs(2, 5 + i, WIDTH)) for i in range(3)], []

    def run(i):
        try:
            for _ in range(20):
                close(model(inputs(2, 5 + i, WIDTH)), wants[i])
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


class Recorder(torch.fx.Tracer):
    """Records calls of these modules without running them, as llm-compressor records those of a model's layers."""

    def __init__(self, *leaves):
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m, module_qualified_name):
        return m in self.leaves or super().is_leaf_module(m, module_qualified_name)


def test_a_forward_that_is_only_recorded_passes_and_the_record_is_checked():
    model, _ = converted(made(lambda: Stack(Attention(), Attention())), (X,))
    want = model(X)
    attentions = [block.attn for block in model.blocks]
    recorded = torch.fx.GraphModule(model, Recorder(*attentions).trace(model))
    close(recorded(X), want)
    attentions[1].forward = types.MethodType(fused, attentions[1])
    with pytest.raises(ValueError, match="did not use its scale"):
        recorded(X)


def test_a_replaced_forward_is_not_recorded():
    model, _ = converted(made(lambda: Stack(Attention(), Attention())), (X,))
    first, second = (block.attn for block in model.blocks)
    second.forward = types.MethodType(lambda self, x: self.proj(x), second)
    with pytest.raises(ValueError, match="did not use its scale"):
        Recorder(first).trace(model)
