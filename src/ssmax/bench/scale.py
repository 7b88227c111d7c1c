"""Formulae of cost and memory for training, prefill and decode by context length, and a check of them by measurement."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from ssmax.bench.measure import alternate, peak_memory, row
from ssmax.functional import attention
from ssmax.runs.rows import Row
from ssmax.sharp.keys import ScreenedKeys


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder-only model like Llama, with its FLOP and bytes. A multiplication and an addition are two FLOP.

    Attributes:
        layers: number of layers.
        width: hidden size.
        heads: query heads.
        key_heads: key heads.
        size: size of a head.
        hidden: width of the feed-forward layer.
        vocabulary: number of tokens; input and output embeddings are two matrices.
        number: bytes of a number in weights, activations and cache.
    """

    layers: int = 32
    width: int = 4096
    heads: int = 32
    key_heads: int = 8
    size: int = 128
    hidden: int = 14336
    vocabulary: int = 128256
    number: int = 2

    @property
    def multiplied(self) -> int:
        """Number of weights that a token is multiplied by: all matrices except the input embedding."""
        projections = 2 * self.width * self.size * (self.heads + self.key_heads)
        return self.layers * (projections + 3 * self.width * self.hidden) + self.width * self.vocabulary

    @property
    def parameters(self) -> int:
        """Number of all weights, norms included; SSMax adds layers * heads."""
        return self.multiplied + self.width * self.vocabulary + (2 * self.layers + 1) * self.width

    def forward_flops(self, tokens: int, causal: bool = True) -> int:
        """FLOP of one sequence: 2 for each weight and token, and 4 D for each query and each key that it sees."""
        seen = tokens * (tokens + 1) // 2 if causal else tokens * tokens
        return 2 * self.multiplied * tokens + 4 * self.layers * self.heads * self.size * seen

    def training_flops(self, tokens: int, causal: bool = True) -> int:
        """FLOP of forward and backward: three times those of the matrices, 3.5 times attention's (flash recomputes scores)."""
        matrices = 2 * self.multiplied * tokens
        return 3 * matrices + (self.forward_flops(tokens, causal) - matrices) * 7 // 2

    def scaling_flops(self, tokens: int) -> int:
        """FLOP that SSMax adds to a forward: a multiplication for each component of a query."""
        return self.layers * self.heads * self.size * tokens

    def query_bytes(self, tokens: int) -> int:
        """Bytes of a layer's queries: the tensor that training with SSMax keeps in addition if the scaling is not fused."""
        return self.heads * self.size * tokens * self.number

    def materialised_bytes(self, tokens: int) -> int:
        """Bytes that a layer keeps for the backward if N x N scores are written out: three tensors of that size."""
        return 3 * self.heads * tokens * tokens * self.number

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of all layers."""
        return 2 * self.layers * self.key_heads * self.size * tokens * self.number

    def screen_bytes(self, tokens: int) -> int:
        """Bytes that ScreenedKeys keeps in addition: int8 codes, the rounding error of each key, the largest of 256 errors."""
        return self.layers * self.key_heads * (tokens * (self.size + 4) + 4 * -(-tokens // 256))

    def decode_bytes(self, tokens: int) -> int:
        """Bytes that a decode step reads: the weights and the cache."""
        return self.multiplied * self.number + self.cache_bytes(tokens)

    def sharp_decode_bytes(self, tokens: int, kept: float) -> int:
        """Bytes that a sharp decode step reads if each head keeps the fraction `kept` of its keys."""
        return (
            self.multiplied * self.number
            + self.layers * self.key_heads * self.size * tokens
            + int(kept * self.cache_bytes(tokens))
        )

    def ring_bytes(self, tokens: int, devices: int) -> int:
        """Bytes that a device sends in a forward of ring attention: its keys and values pass all other devices."""
        return self.cache_bytes(tokens) * (devices - 1) // devices

    def ulysses_bytes(self, tokens: int, devices: int) -> int:
        """Bytes that a device sends in a forward of Ulysses: query, key, value and output, without its own part."""
        numbers = 2 * self.layers * self.size * (self.heads + self.key_heads) * tokens * self.number
        return numbers * (devices - 1) // devices**2

    def scale_bytes(self, devices: int) -> int:
        """Bytes that a device sends more in a training step with SSMax: the ring all-reduce of s's gradient, float32."""
        return 2 * 4 * self.layers * self.heads * (devices - 1) // devices


TINY = Shape(layers=2, width=128, heads=4, key_heads=2, size=32, hidden=352, vocabulary=512, number=4)


def check() -> Iterator[Row]:
    """Yield the ratio of measurement to formula, for what can be measured on this machine."""
    for what, at, measured, formula in _checks():
        yield row("measured_over_formula", "ssmax", {"what": what, **at, "formula": formula}, measured / formula, 1)


def _checks():
    model, ids = _model(), torch.randint(0, 512, (1, 1024))
    yield "parameters", {}, sum(p.numel() for p in model.parameters()) - TINY.layers * TINY.heads, TINY.parameters
    for length in (256, 1024):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            cache = model(ids[:, :length], use_cache=True).past_key_values
        at = {"length": length}
        # Counted with eager attention, which also computes the masked half of the scores.
        yield "forward FLOP", at, counter.get_total_flops(), TINY.forward_flops(length, causal=False)
        held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        yield "cache bytes", at, held, TINY.cache_bytes(length)
    for length in (8192, 32768):
        one = Shape(layers=1, heads=8, key_heads=8, size=64, number=4)
        screened = ScreenedKeys(torch.randn(1, 8, length, 64))
        screened.ready()
        yield "screen bytes", {"length": length}, screened.screen_bytes, one.screen_bytes(length)
    yield from _attention_checks()


def _attention_checks():
    one = Shape(layers=1, heads=8, key_heads=8, size=64, number=4)
    for length in (2048, 4096, 8192):
        q, k, v = (torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3))
        s = torch.full((8,), 0.43, requires_grad=True)
        more = peak_memory(lambda: attention(q, k, v, s, is_causal=True).sum().backward())  # noqa: B023
        plain = peak_memory(lambda: scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward())  # noqa: B023
        yield "one more query in training, bytes", {"length": length}, more - plain, one.query_bytes(length)
    with torch.no_grad():
        inputs = {length: [torch.randn(1, 8, length, 64) for _ in range(3)] for length in (4096, 8192)}
        calls = {str(n): partial(attention, q, k, v, 0.43, is_causal=True) for n, (q, k, v) in inputs.items()}
        short, long = map(min, alternate(calls, 8, "attention")[0].values())
        yield "growth of attention's time, 4,096 to 8,192", {}, long / short, (8192 * 8193) / (4096 * 4097)
        caches = {keys: [torch.randn(1, 4, keys, 64) for _ in range(2)] for keys in (65536, 262144)}
        calls = {str(n): partial(attention, k[:, :, :1], k, v, 0.43) for n, (k, v) in caches.items()}
        short, long = map(min, alternate(calls, 40, "decode")[0].values())
        yield "growth of a decode step's time, 65,536 to 262,144", {}, long / short, 4.0


def _model():
    from transformers import LlamaConfig, LlamaForCausalLM

    from ssmax.conversion import convert
    from ssmax.hf.private import set_implementation

    torch.manual_seed(0)
    t = TINY
    config = LlamaConfig(
        vocab_size=t.vocabulary, hidden_size=t.width, intermediate_size=t.hidden, num_hidden_layers=t.layers,
        num_attention_heads=t.heads, num_key_value_heads=t.key_heads, head_dim=t.size,
    )  # fmt: skip
    set_implementation(config, "eager")
    return convert(LlamaForCausalLM(config).eval())
