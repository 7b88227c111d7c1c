"""The cost of SSMax in modules that are not transformers models: a training step over that of the plain module."""

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ssmax.bench.measure import PLAIN, Comparison, largest_error
from ssmax.conversion import convert

WIDTH, HEADS, LENGTH, LAYERS = 256, 8, 2048, 2


class CausalSelfAttention(nn.Module):
    """The attention of nanoGPT."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (B, N, WIDTH), to the same shape."""
        q, k, v = (y.view(*y.shape[:2], HEADS, -1).transpose(1, 2) for y in self.c_attn(x).split(WIDTH, 2))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """The block of nanoGPT."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), CausalSelfAttention()
        width = 4 * WIDTH
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (B, N, WIDTH), to the same shape."""
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


def measurements() -> Iterator[Comparison]:
    """Forward and backward of nn.TransformerEncoder (without a mask, padded, causal) and of nanoGPT's blocks."""
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
    # "identity" computes the same function, so that outputs can be compared.
    model = convert(copy.deepcopy(plain), "identity", example=example or None)
    models = {PLAIN: plain, "ssmax": model}

    def step(model):
        model.zero_grad()
        run(model).sum().backward()

    def error():
        with torch.no_grad():
            return largest_error(run(model), run(plain).double())

    at = {"case": name, "length": LENGTH, "width": WIDTH}
    return Comparison(at, {who: functools.partial(step, m) for who, m in models.items()}, 24, {"ssmax": error})
