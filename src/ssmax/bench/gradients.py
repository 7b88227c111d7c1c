"""Errors of the gradients of s and b: on torch's kernel, and by impl="triton" in Triton's interpreter."""

import itertools
import os
from collections.abc import Iterator

import torch

from ssmax.bench.cases import S, tensors
from ssmax.bench.kernel import OURS, tagged
from ssmax.bench.measure import row
from ssmax.errors import UserError
from ssmax.functional import attention
from ssmax.runs.rows import Row

SCORES = ("random", "competing", "peaked")


def measurements() -> Iterator[Row]:
    """Relative error of ds and db in bfloat16 attention on torch's kernel (a scaled query), against float64."""
    for length, scores in itertools.product((1024, 4096), SCORES):
        for dtype in (torch.float32, torch.bfloat16):
            yield from scale_gradient_errors(length, scores, torch.bfloat16, {"ssmax": ("sdpa", dtype)})


def interpreted() -> Iterator[Row]:
    """Yield relative errors of the gradients of s and b in float16: impl="triton" in the interpreter, and torch's kernel.

    Raises:
        UserError: TRITON_INTERPRET is not 1, which Triton reads when it is imported.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("case 'kernel-gradient' needs TRITON_INTERPRET=1 in the environment")
    contenders = {OURS: ("triton", torch.float16), "ssmax sdpa": ("sdpa", torch.float16)}
    for scores in SCORES:
        for made in scale_gradient_errors(1024, scores, torch.float16, contenders):
            yield tagged(made)


def scale_gradient_errors(
    length: int, scores: str, rounded: torch.dtype, contenders: dict[str, tuple[str, torch.dtype]]
) -> Iterator[Row]:
    """Yield relative errors (L2) of ds and db against float64.

    All inputs are numbers of the dtype `rounded`, so that only the arithmetic differs.

    Args:
        length: causal tokens.
        scores: one of SCORES. "competing": four keys of each query have slightly higher scores.
            "peaked": one has a much higher score.
        rounded: a narrow dtype.
        contenders: by variant, impl and dtype of the attention.
    """
    q, k, v = tensors(length, heads=4, dtype=torch.float64, seed=length)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for lag in range({"random": 0, "competing": 4, "peaked": 1}[scores]):
        target = (torch.arange(length) * 7 + lag * 13) % (torch.arange(length) + 1)
        q = q + k[:, :, target] * (0.5 if scores == "competing" else 1.0)
    inputs = [x.to(rounded) for x in (q, k, v, upstream)]
    exact = _scale_gradients("reference", torch.float64, inputs)
    for variant, (impl, dtype) in contenders.items():
        for name, mine, truth in zip("sb", _scale_gradients(impl, dtype, inputs), exact, strict=True):
            error = ((mine.double() - truth).norm() / truth.norm()).item()
            at = {"length": length, "scores": scores, "gradient": name, "dtype": str(dtype).removeprefix("torch.")}
            yield row("gradient_error", variant, at, error, 4)


def _scale_gradients(impl, dtype, inputs):
    """Return the gradients of s and b per head."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    s, b = (torch.full((4,), x, dtype=wide, requires_grad=True) for x in (S, 0.0))
    q, k, v, upstream = (x.to(dtype) for x in inputs)
    output = attention(q, k, v, s, b, is_causal=True, impl=impl)
    return torch.autograd.grad((output * upstream).sum(), [s, b])
