"""Benchmarks: ratios against plain attention in the same process, contenders in alternation, medians and quartiles.

    python benchmarks/run.py overhead     attention() over scaled_dot_product_attention, forward and backward
    python benchmarks/run.py model        a converted Llama over the plain one: training step, cached decoding
    python benchmarks/run.py peer         this library beside the PyPI package scalable-softmax: right, fast, small?
    python benchmarks/run.py gradient     error of the gradients of s and b in bfloat16
    python benchmarks/run.py evaluation   loss by position over a plain forward; retrieval with shared prefixes over without

Each prints a table and writes its rows to benchmarks/results/CASE.jsonl.
"""

import copy
import math
import platform
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import ssmax
from ssmax import attention
from ssmax.results import Row, write_rows

RESULTS = Path(__file__).parent / "results"
S = 0.43


def tensors(length, heads=8, size=64, batch=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length, size)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(contenders, repeats):
    """Time each contender once a round, in alternating order; return the times by name."""
    times = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for turn in range(repeats):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            times[name].append(timed(contenders[name]))
    return times


def ratios(times, base):
    """Median and quartiles of the rounds' own ratios: what slows a whole round down cancels."""
    result = {}
    for name, values in times.items():
        of_rounds = [mine / plain for mine, plain in zip(values, times[base], strict=True)]
        low, middle, high = statistics.quantiles(of_rounds, n=4)
        result[name] = (middle, low, high)
    return result


def step(call, leaves):
    def run():
        for leaf in leaves:
            leaf.grad = None
        call().sum().backward()

    return run


def peak_memory(call):
    """Bytes that a call allocates at its peak beyond what was there, from torch's own profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def overhead():
    """Forward and backward of attention() over plain attention, causal."""
    rows = []
    for length, repeats in ((1024, 40), (2048, 24), (4096, 12), (8192, 8)):
        q, k, v = tensors(length)
        s = torch.full((8,), S, requires_grad=True)
        contenders = {
            "plain": step(lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v]),
            "ssmax": step(lambda q=q, k=k, v=v, s=s: attention(q, k, v, s, is_causal=True), [q, k, v, s]),
        }
        found = ratios(alternate(contenders, repeats), "plain")
        middle, low, high = found["ssmax"]
        rows.append(row("overhead", "ssmax", {"length": length, "low": low, "high": high}, middle, repeats))
        show(f"{length:>6} tokens, 8 heads of 64, fp32", f"{middle:.3f}  ({low:.3f} to {high:.3f})")
    return rows


def model():
    """A Llama of 8 layers, converted, over the same one plain: a training step and 32 cached decode steps."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=4096, **shape))
    converted = ssmax.convert(copy.deepcopy(plain))
    tokens = torch.randint(0, 4096, (1, 2080), generator=torch.Generator().manual_seed(0))

    def train(model):
        def run():
            model.zero_grad()
            model(tokens[:, :1024], labels=tokens[:, :1024]).loss.backward()

        return run

    def decode(model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :2048], past_key_values=cache)

        @torch.no_grad()
        def run():
            for i in range(2048, 2080):
                model(tokens[:, i : i + 1], past_key_values=cache)
            cache.crop(-32)

        return run

    rows = []
    for name, case, repeats in (("training step, 1,024 tokens", train, 24), ("cached decode, 2,048 keys", decode, 24)):
        contenders = {"plain": case(plain), "ssmax": case(converted)}
        middle, low, high = ratios(alternate(contenders, repeats), "plain")["ssmax"]
        rows.append(row("overhead", "ssmax", {"case": name, "low": low, "high": high}, middle, repeats))
        show(f"converted Llama, 8 layers, 512 wide, fp32: {name}", f"{middle:.3f}  ({low:.3f} to {high:.3f})")
    return rows


CASES = {
    "causal": {},
    "left padding": {"pad": 40},
    "window of 64": {"window": 64},
    "two packed documents": {"split": 100},
    "decode, 256 keys": {"rows": 1},
    "static cache, 100 of 256 slots": {"rows": 1, "filled": 100},
}


def visibility(length, rows=None, pad=0, window=None, split=None, filled=None):
    key = torch.arange(length)
    query = key[-(rows or length) :, None] if filled is None else torch.tensor([[filled - 1]])
    table = (key <= query) & (key >= pad)
    if window is not None:
        table &= key > query - window
    if split is not None:
        table &= (key < split) == (query < split)
    return table


def peer():
    """The package scalable-softmax and ssmax on the same masked cases: error against float64, time, memory."""
    try:
        from scalable_softmax import ScalableSoftmax
    except ModuleNotFoundError:
        sys.exit("peer needs the package: pip install scalable-softmax==0.1.5")
    theirs = ScalableSoftmax(s=S)

    def by_peer(q, k, v, table):
        z = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~table, -math.inf)
        return theirs(z).nan_to_num() @ v

    rows = []
    for name, case in CASES.items():
        q, k, v = (x.detach() for x in tensors(256, heads=4))
        table = visibility(256, **case)
        q = q[:, :, -table.shape[0] :]
        exact = attention(q.double(), k.double(), v.double(), S, attn_mask=table, impl="reference")
        for contender, got in (
            ("scalable-softmax 0.1.5", by_peer(q, k, v, table)),
            ("ssmax", attention(q, k, v, S, attn_mask=table)),
        ):
            error = (got.double() - exact).abs().max().item()
            rows.append(row("error", contender, {"case": name}, error, 1))
            show(f"{name}: {contender}", f"error {error:.1e}  {'right' if error < 1e-5 else 'WRONG'}")
    q, k, v = tensors(8192, heads=2)
    s = torch.full((2,), S, requires_grad=True)
    table = visibility(8192)
    contenders = {
        "ssmax": step(lambda: attention(q, k, v, s, is_causal=True), [q, k, v, s]),
        "scalable-softmax 0.1.5": step(lambda: by_peer(q, k, v, table), [q, k, v]),
    }
    found = ratios(alternate(contenders, 4), "ssmax")
    memory = {name: peak_memory(call) for name, call in contenders.items()}
    for name in contenders:
        rows.append(row("time_ratio", name, {"length": 8192}, found[name][0], 4))
        rows.append(row("peak_bytes", name, {"length": 8192}, memory[name], 1))
        show(
            f"8,192 tokens, 2 heads, causal, forward + backward: {name}",
            f"time x {found[name][0]:.1f}, peak {memory[name] / 2**20:,.0f} MiB",
        )
    return rows


def gradient():
    """Relative error of ds and db in bfloat16 attention with the query scaled outside, against float64."""
    rows = []
    for length in (1024, 4096):
        for kind in ("random", "competing", "peaked"):
            q, k, v = (x.detach().clone() for x in tensors(length, heads=4, dtype=torch.float64, seed=length))
            if kind != "random":
                # One key of each query leads: by little ("competing", four of them) or by much ("peaked").
                for lag in range(4 if kind == "competing" else 1):
                    target = (torch.arange(length) * 7 + lag * 13) % (torch.arange(length) + 1)
                    q = q + k[:, :, target] * (0.5 if kind == "competing" else 1.0)
            upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            exact = scale_gradients(q, k, v, upstream, torch.float64)
            for dtype in (torch.float32, torch.bfloat16):
                got = scale_gradients(q, k, v, upstream, dtype, rounded=torch.bfloat16)
                for name, mine, truth in zip("sb", got, exact, strict=True):
                    error = ((mine.double() - truth).norm() / truth.norm()).item()
                    at = {
                        "length": length,
                        "scores": kind,
                        "gradient": name,
                        "dtype": str(dtype).removeprefix("torch."),
                    }
                    rows.append(row("gradient_error", "ssmax", at, error, 4))
                    show(f"{length} tokens, {kind}, d{name}, {at['dtype']}", f"{error:.2e}")
    return rows


def evaluation():
    """loss_by_position over a plain forward with all logits, and grids of sizes x depths over cell by cell."""
    import numpy as np
    from torch.nn.functional import cross_entropy
    from transformers import LlamaConfig, LlamaForCausalLM

    from ssmax.evaluation import ABCDigits, NeedleTask, loss_by_position, retrieve, retrieve_grid
    from ssmax.evaluation.retrieval import grid_tokens
    from ssmax.evaluation.tasks import depth_grid

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32_768, max_position_embeddings=8192, **shape)).eval()
    rows = []
    for length, repeats in ((2048, 10), (4096, 6)):
        tokens = torch.randint(0, 32_768, (1, length + 1), generator=torch.Generator().manual_seed(0))

        @torch.inference_mode()
        def plain(tokens=tokens):
            logits = model(tokens[:, :-1], use_cache=False).logits
            return cross_entropy(logits[0], tokens[0, 1:], reduction="none")

        contenders = {"plain": plain, "loss_by_position": lambda tokens=tokens: loss_by_position(model, tokens)}
        middle, low, high = ratios(alternate(contenders, repeats), "plain")["loss_by_position"]
        rows.append(
            row("time_ratio", "loss_by_position", {"length": length, "low": low, "high": high}, middle, repeats)
        )
        show(f"loss by position over a plain forward, {length:,} tokens", f"{middle:.3f}  ({low:.3f} to {high:.3f})")
        for name, call in contenders.items():
            rows.append(row("peak_bytes", name, {"length": length}, peak_memory(call), 1))
            show(f"peak memory beyond the weights: {name}", f"{rows[-1].value / 2**20:,.0f} MiB")

    def encode(text):
        return [ord(character) for character in text]

    haystack, repeats = np.random.default_rng(0).integers(32, 126, 8192), 4
    steps, doubled = (300, 600, 900, 1200, 1500), (128, 256, 512, 1024, 2048)
    grids = {
        "needle, sizes in equal steps": (NeedleTask(encode, haystack), steps),
        "needle, sizes doubled": (NeedleTask(encode, haystack), doubled),
        "several, sizes in equal steps": (NeedleTask(encode, haystack, several=True), steps),
        "distractors, sizes in equal steps": (NeedleTask(encode, haystack, distractors=3), steps),
        "abc, sizes in equal steps": (ABCDigits(encode), steps),
    }
    for name, (task, lengths) in grids.items():
        grid = task.grid(depth_grid(lengths, (0.0, 0.25, 0.5, 0.75, 1.0)), np.random.default_rng(0))
        contenders = {
            "cell by cell": lambda grid=grid: [retrieve(model, [example], chunk=1024) for example in grid.values()],
            "shared prefixes": lambda grid=grid: retrieve_grid(model, [grid], chunk=1024),
        }
        of_rounds = alternate(contenders, repeats)
        middle, low, high = ratios(of_rounds, "shared prefixes")["cell by cell"]
        tokens = sum(len(x.prompt) - 1 for x in grid.values()) / grid_tokens([grid])
        at = {"grid": name, "cells": len(grid), "low": low, "high": high, "token_ratio": tokens}
        rows.append(row("prefix_speedup", "shared prefixes", at, middle, repeats))
        show(
            f"{name}, {len(grid)} cells: times quicker with shared prefixes", f"{middle:.2f}  ({low:.2f} to {high:.2f})"
        )
    return rows


def scale_gradients(q, k, v, upstream, dtype, rounded=torch.bfloat16):
    """Gradients of s and b per head. All inputs are bfloat16 numbers, so that only the arithmetic differs."""
    s, b = (
        torch.full((4,), x, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
        for x in (S, 0.0)
    )
    q, k, v, upstream = (x.to(rounded).to(dtype) for x in (q, k, v, upstream))
    output = attention(q, k, v, s, b, is_causal=True, impl="reference" if dtype == torch.float64 else "sdpa")
    return torch.autograd.grad((output * upstream).sum(), [s, b])


def row(metric, variant, at, value, samples):
    provenance = {
        "ssmax": ssmax.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return Row(metric, variant, None, at, value, samples, provenance)


def show(name, value):
    print(f"{name:<75} {value}", flush=True)


if __name__ == "__main__":
    cases = {"overhead": overhead, "model": model, "peer": peer, "gradient": gradient, "evaluation": evaluation}
    if len(sys.argv) != 2 or sys.argv[1] not in cases:
        sys.exit(__doc__)
    file = RESULTS / f"{sys.argv[1]}.jsonl"
    write_rows(file, cases[sys.argv[1]]())
