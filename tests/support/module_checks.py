"""What every converted module is asked."""

import copy

import torch
from attention_modules import (
    randomise,
)

import ssmax

OPEN = torch.ones(1, 1, dtype=torch.bool)


def causal(rows, keys):
    """torch's own alignment: top left."""
    return torch.arange(keys) <= torch.arange(rows)[:, None]


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(build, *arguments, seed=3):
    torch.manual_seed(seed)
    return build(*arguments).double().eval()


def converted(plain, example, **options):
    """A converted copy with values of its own, and these."""
    model = ssmax.convert(copy.deepcopy(plain), 0.5, bias=True, example=example, **options)
    return model, randomise(model)


def close(got, want, tolerance=1e-12):
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


def differs(got, other):
    assert (got - other).abs().max() > 1e-4, "the comparison would not notice SSMax"


def trains_alike(model, got, plain, want):
    """The same gradient in every weight."""
    got.square().sum().backward()
    want.square().sum().backward()
    gradients = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        close_gradient = gradients[name].grad
        torch.testing.assert_close(close_gradient, parameter.grad, atol=1e-9, rtol=1e-9)
    assert all(p.grad.abs().max() > 0 for name, p in gradients.items() if "ssmax" in name)
