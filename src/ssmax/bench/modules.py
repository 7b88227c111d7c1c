"""What SSMax costs in modules that are no transformers models: a training step over the same one of the plain model."""

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ssmax.bench.measure import PLAIN, Comparison, largest_error
from ssmax.conversion import convert

__all__ = ["measurements"]

WIDTH, HEADS, LENGTH, LAYERS = 256, 8, 2048, 2


class CausalSelfAttention(nn.Module):
    """nanoGPT's."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, WIDTH)."""
        q, k, v = (y.view(*y.shape[:2], HEADS, -1).transpose(1, 2) for y in self.c_attn(x).split(WIDTH, 2))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """nanoGPT's block."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), CausalSelfAttention()
        width = 4 * WIDTH
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, WIDTH)."""
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


def measurements() -> Iterator[Comparison]:
    """Forward with backward of nn.TransformerEncoder, also padded and causal, and of nanoGPT's blocks."""
    torch.manual_seed(0)
    x = torch.randn(1, LENGTH, WIDTH)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    padding = torch.arange(LENGTH)[None] >= LENGTH - 100
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    masks: dict[str, dict[str, Tensor]] = {
        "no mask": {},
        "padded": {"src_key_padding_mask": padding},
        "causal mask": {"mask": causal},
    }
    for name, given in masks.items():
        yield _compare(f"nn.TransformerEncoder, {name}", encoder, lambda model, given=given: model(x, **given))
    yield _compare("nanoGPT", nn.Sequential(*[Block() for _ in range(LAYERS)]), lambda model: model(x), x)


def _compare(name: str, plain: nn.Module, run: Callable[[nn.Module], Tensor], *example: Tensor) -> Comparison:
    model = convert(
        copy.deepcopy(plain), "identity", example=example or None
    )  # the same function, so that it can be checked
    models = {PLAIN: plain, "ssmax": model}

    def step(model):
        model.zero_grad()
        run(model).sum().backward()

    def error():
        with torch.no_grad():
            return largest_error(run(model), run(plain).double())

    at = {"case": name, "length": LENGTH, "width": WIDTH}
    return Comparison(at, {who: functools.partial(step, m) for who, m in models.items()}, 24, {"ssmax": error})
