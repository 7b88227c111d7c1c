"""The cases of ssmax bench. To add one, write a generator of comparisons (or rows) and its entry in CASES."""

import copy
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ssmax.bench import scale
from ssmax.bench.measure import PLAIN, Case, Comparison, largest_error
from ssmax.conversion import convert
from ssmax.functional import attention
from ssmax.sharp.keys import ScreenedKeys

S = 0.43  # as in Figure 1 of the paper; the cost does not depend on it
HEADS, SIZE = 8, 64
ROWS = 64  # rows at either end of a long output that are compared with float64


def tensors(length: int, heads: int = HEADS, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Return Gaussian query, key and value, (1, heads, length, 64)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, length, SIZE, generator=generator).to(dtype) for _ in range(3)]


def causal_attention() -> Iterator[Comparison]:
    """Forward, and forward with backward, by length."""
    forwards: dict[str, Callable[..., Tensor]] = {
        PLAIN: lambda q, k, v, s: scaled_dot_product_attention(q, k, v, is_causal=True),
        "ssmax": lambda q, k, v, s: attention(q, k, v, s, is_causal=True),
        "materialised": _materialised,
        "ssmax, flex": lambda q, k, v, s: attention(q, k, v, s, is_causal=True, impl="flex"),
    }
    for length, direction in itertools.product((1024, 4096, 8192), ("forward", "forward + backward")):
        inputs = (*tensors(length), torch.full((HEADS,), S))
        chosen = dict(forwards)
        if direction != "forward" or length > 4096 or not _flex_runs():
            del chosen["ssmax, flex"]
        if length > 4096:
            del chosen["materialised"]
        make = _forward if direction == "forward" else _forward_backward
        yield Comparison(
            {"length": length, "heads": HEADS, "pass": direction},
            {name: make(call, inputs) for name, call in chosen.items()},
            {1024: 60, 4096: 14, 8192: 8}[length],
            {name: functools.partial(_error, call, inputs) for name, call in chosen.items() if name != PLAIN},
            memory=length == 4096,
        )


def _materialised(q, k, v, s):
    """Causal SSMax as in the formula, with N x N scores in memory."""
    length = q.shape[2]
    n = torch.arange(1, length + 1, dtype=q.dtype)
    z = q @ k.mT * SIZE**-0.5 * (s[:, None] * n.log())[..., None]
    return z.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v


def _forward(call, inputs=()):
    def run():
        with torch.no_grad():
            call(*inputs)

    return run


def _forward_backward(call, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]

    def run():
        for leaf in leaves:
            leaf.grad = None
        call(*leaves).sum().backward()

    return run


def _error(call, inputs):
    """Largest error of the first and last rows, and of the gradients of the first ones, against float64."""
    q, k, v, s = inputs
    with torch.no_grad():
        got = call(q, k, v, s)
        wide = [x.double() for x in (q[:, :, -ROWS:], k, v, s)]
        last = attention(*wide, is_causal=True, impl="reference")
    first = [x.clone().requires_grad_() for x in (q[:, :, :ROWS], k[:, :, :ROWS], v[:, :, :ROWS], s)]
    exact = [x.detach().double().requires_grad_() for x in first]
    want = attention(*exact, is_causal=True, impl="reference")
    error = max(largest_error(got[:, :, -ROWS:], last), largest_error(got[:, :, :ROWS], want.detach()))
    try:
        gradients = torch.autograd.grad(call(*first).sum(), first)
    except ValueError:  # a backend without gradients, which is timed forward only
        return error
    pairs = zip(gradients, torch.autograd.grad(want.sum(), exact), strict=True)
    return max(error, *(largest_error(mine, truth) / max(1.0, truth.abs().max().item()) for mine, truth in pairs))


def _errors(calls: dict[str, Callable[[], Tensor]], exact: Tensor, rows: int = 0) -> dict[str, Callable[[], float]]:
    """Return for each call a function that returns the largest error of its last rows. 0: of all rows."""
    return {name: functools.partial(_largest, call, exact, rows) for name, call in calls.items()}


def _largest(call, exact, rows):
    return largest_error(call()[:, :, -rows:].detach(), exact)


@functools.cache
def _flex_runs():
    q = torch.zeros(1, 1, 128, SIZE)
    try:
        attention(q, q, q, S, is_causal=True, impl="flex")
    except Exception:  # it needs a C++ compiler, and raises many kinds of errors without one
        return False
    return True


def decode() -> Iterator[Comparison]:
    """One query after a long cache: sharp decoding over plain."""
    sizes = ((32768, 8, 200), (131072, 4, 100), (1048576, 1, 60))
    for (keys, heads, repeats), kind in itertools.product(sizes, ("peaked", "diffuse", "flat")):
        q, k, v = tensors(keys, heads)
        q, screened = q[:, :, -1:], ScreenedKeys(k)
        k = screened.keys  # all contenders read the same memory: a cache holds its keys once
        if kind == "peaked":  # the query of each head equals one key
            target = torch.randint(keys, (1, heads, 1, 1), generator=torch.Generator().manual_seed(1))
            q = k.gather(2, target.expand(-1, -1, -1, SIZE)).clone()
        # Otherwise the query is independent of all keys: SSMax with s = 1 is diffuse, Softmax (s log n = 1) is flat.
        s = {"peaked": S, "diffuse": 1.0, "flat": 1 / math.log(keys)}[kind]
        factor = s * math.log(keys) * SIZE**-0.5
        calls: dict[str, Callable[[], Tensor]] = {
            PLAIN: functools.partial(scaled_dot_product_attention, q, k, v, scale=factor),
            "ssmax": functools.partial(attention, q, k, v, s),
            "ssmax, sharp": functools.partial(attention, q, screened, v, s, impl="sharp"),
            "ssmax, sharp, no screen": functools.partial(attention, q, k, v, s, impl="sharp"),
        }
        by_head = (x.double().split(1, 1) for x in (q, k, v))
        exact = torch.cat([attention(q, k, v, s, impl="reference") for q, k, v in zip(*by_head, strict=True)], 1)
        yield Comparison(
            {"keys": keys, "heads": heads, "scores": kind},
            {name: _forward(call) for name, call in calls.items()},
            repeats,
            _errors(calls, exact),
            allowed=2e-3 * v.abs().max().item(),
        )


def grouped_decode() -> Iterator[Comparison]:
    """One query after a long cache whose key heads serve several query heads each."""
    for heads, key_heads, keys in ((9, 3, 8192), (9, 3, 32768), (32, 8, 8192)):
        (q, *_), (_, k, v), s = tensors(1, heads), tensors(keys, key_heads), 1 / math.log(keys)
        calls: dict[str, Callable[[], Tensor]] = {
            PLAIN: functools.partial(scaled_dot_product_attention, q, k, v, enable_gqa=True),
            "ssmax": functools.partial(attention, q, k, v, s, enable_gqa=True),
        }
        exact = attention(q.double(), k.double(), v.double(), s, enable_gqa=True, impl="reference")
        yield Comparison(
            {"heads": heads, "key_heads": key_heads, "keys": keys},
            {name: _forward(call) for name, call in calls.items()},
            100,
            _errors(calls, exact),
            allowed=1e-4,
        )


def converted_model() -> Iterator[Comparison]:
    """A converted Llama of 8 layers over the plain one: a training step, and 32 cached decode steps."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=4096, **shape))
    models: dict[str, Any] = {PLAIN: plain, "ssmax": convert(copy.deepcopy(plain))}
    tokens = torch.randint(0, 4096, (1, 2080), generator=torch.Generator().manual_seed(0))

    def train(model):
        model.zero_grad()
        model(tokens[:, :1024], labels=tokens[:, :1024]).loss.backward()

    def decoding(model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :2048], past_key_values=cache)

        @torch.no_grad()
        def run():
            for i in range(2048, 2080):
                model(tokens[:, i : i + 1], past_key_values=cache)
            cache.crop(-32)

        return run

    training = {name: functools.partial(train, model) for name, model in models.items()}
    yield Comparison({"case": "training step, 1,024 tokens"}, training, 24)
    yield Comparison({"case": "cached decode, 2,048 keys"}, {name: decoding(m) for name, m in models.items()}, 60)


LAYOUTS: dict[str, dict[str, int]] = {
    "causal": {},
    "left padding": {"pad": 40},
    "window of 64": {"window": 64},
    "two packed documents": {"split": 100},
    "decode, 256 keys": {"rows": 1},
    "static cache, 100 of 256 slots": {"rows": 1, "filled": 100},
}


def visibility(length, rows=None, pad=0, window=None, split=None, filled=None):
    """Return which keys each query sees, (rows, length), bool."""
    key = torch.arange(length)
    query = key[-(rows or length) :, None] if filled is None else torch.tensor([[filled - 1]])
    table = (key <= query) & (key >= pad)
    if window is not None:
        table &= key > query - window
    if split is not None:
        table &= (key < split) == (query < split)
    return table


def peer() -> Iterator[Comparison]:
    """The package scalable-softmax beside ssmax, on the same masked layouts and on 8,192 tokens."""
    from scalable_softmax import ScalableSoftmax  # pyrefly: ignore[missing-import]

    theirs = ScalableSoftmax(s=S)

    def by_peer(q, k, v, table):
        z = (q @ k.mT * SIZE**-0.5).masked_fill(~table, -math.inf)
        return theirs(z).nan_to_num() @ v

    for name, layout in LAYOUTS.items():
        q, k, v = tensors(256, heads=4)
        table = visibility(256, **layout)
        q = q[:, :, -table.shape[0] :]
        exact = attention(q.double(), k.double(), v.double(), S, attn_mask=table, impl="reference")
        calls = {
            "ssmax": functools.partial(attention, q, k, v, S, attn_mask=table),
            "scalable-softmax": functools.partial(by_peer, q, k, v, table),
        }
        yield Comparison(
            {"layout": name},
            {who: _forward(call) for who, call in calls.items()},
            40,
            _errors(calls, exact),
            base="ssmax",
        )
    q, k, v = tensors(8192, heads=2)
    inputs = (q, k, v, torch.full((2,), S))
    n = torch.arange(1, 8193)
    table = visibility(8192)
    # The package takes the row's whole length for n. Scaling the rows corrects that, so that causal rows can be timed.
    right = (n.log() / math.log(8192))[:, None]
    forwards = {
        False: lambda q, k, v, s: theirs(q @ k.mT * SIZE**-0.5) @ v + 0 * s.sum(),
        True: lambda q, k, v, s: by_peer(q * right, k, v, table) + 0 * s.sum(),
    }
    for causal, name in ((False, "all keys visible"), (True, "causal, its n put right")):
        last = q[:, :, -ROWS:].double()
        exact = attention(last, k.double(), v.double(), S, is_causal=causal, impl="reference")
        calls = {"ssmax": functools.partial(attention, is_causal=causal), "scalable-softmax": forwards[causal]}
        yield Comparison(
            {"length": 8192, "heads": 2, "pass": f"forward + backward, {name}"},
            {who: _forward_backward(call, inputs) for who, call in calls.items()},
            6,
            _errors({who: functools.partial(call, *inputs) for who, call in calls.items()}, exact, ROWS),
            base="ssmax",
            memory=True,
        )


def _of(module: str, name: str = "measurements") -> Callable[..., Iterator[Any]]:
    """Return a function of a module; the module is loaded when the case runs."""
    return lambda **options: getattr(importlib.import_module(f"ssmax.bench.{module}"), name)(**options)


CASES = {
    "attention": Case(
        "attention() over plain attention: 1,024 to 8,192 causal tokens, forward and backward", 6, causal_attention
    ),
    "decode": Case("sharp decoding over plain decoding, 32k keys x 8 heads to 1M x 1", 3, decode),
    "grouped": Case("attention() over plain attention in a decode step with grouped heads", 1, grouped_decode),
    "generate": Case("generate with SharpCache over transformers' caches, after a real prompt", 8, _of("generate")),
    "blocks": Case("upper bound of the blocks of keys that a prefill could skip, by head", 1, _of("blocks")),
    "model": Case("a converted Llama over the plain one: training step, cached decoding", 3, converted_model),
    "modules": Case("nn.TransformerEncoder and nanoGPT, converted, over the plain ones", 2, _of("modules")),
    "peer": Case("errors, time and memory beside the PyPI package scalable-softmax", 2, peer),
    "evaluation": Case(
        "loss by position over a plain forward; retrieval grids with shared prefixes", 12, _of("evaluation")
    ),
    "training": Case(
        "pretraining of the recipe tiny over a bare loop; also AdamW not fused, and torch.compile", 3, _of("training")
    ),
    "gradient": Case("error of the gradients of s and b in bfloat16", 2, _of("gradients")),
    "kernel": Case(
        "impl='triton' on a GPU: errors, and time over torch's flash kernels",
        10,
        _of("kernel"),
        _of("kernel", "dry_run"),
    ),
    "kernel-gradient": Case(
        "error of the gradients of s and b by impl='triton' in Triton's interpreter",
        2,
        _of("gradients", "interpreted"),
    ),
    "scale": Case("measured cost and memory over the formulae of docs/scale.md", 1, scale.check),
}
