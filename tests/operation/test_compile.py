"""torch.compile and memory: one graph, no second one for each length, nothing of size N x N."""

import math
import re
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_model
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

import ssmax
from ssmax import SSMaxScale, attention, visible_keys

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


SCALE = SSMaxScale(4).requires_grad_(False)


class CountGraphs:
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def tensors(rows, keys):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, length, 8, generator=generator) for length in (rows, keys, keys)]


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": True, "window": 5},
        {},
        {"attn_mask": torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.3},
        {"attn_mask": torch.ones(2, 1, 1, 16, dtype=torch.bool), "is_causal": True},
    ],
    ids=["causal", "window", "bidirectional", "mask", "padding"],
)
def test_attention_is_one_graph(options):
    q, k, v = tensors(16, 16)
    s = torch.full((4,), 0.4, requires_grad=True)

    def run(s, q, k, v):
        return attention(q, k, v, s, **options)

    backend = CountGraphs()
    got = torch.compile(run, backend=backend, fullgraph=True)(s, q, k, v)
    torch.testing.assert_close(got, run(s, q, k, v))
    assert backend.graphs == 1


def test_two_graphs_serve_64_decode_lengths():
    backend = CountGraphs()
    decode = torch.compile(lambda q, k, v, s: attention(q, k, v, s, is_causal=True), backend=backend, fullgraph=True)
    s = torch.full((4,), 0.4)
    for keys in range(3, 67):
        q, k, v = tensors(1, keys)
        torch.testing.assert_close(decode(q, k, v, s), attention(q, k, v, s, is_causal=True))
    assert backend.graphs <= 2


@pytest.mark.parametrize(
    "run",
    [
        lambda q, k, v, s: attention(q[:, :, :1], k, v, s, is_causal=True, window=8),
        lambda q, k, v, s: attention(q[:, :, :1], k, v, s, n=k.shape[2]),
        lambda q, k, v, s: attention(q, k, v, s, is_causal=True, window=8),
        lambda q, k, v, s: SCALE(q[:, :, :1], k.shape[2]),
    ],
    ids=["decode in a window", "an integer n", "whole windows", "module, an integer n"],
)
def test_lengths_do_not_compile_anew(run):
    backend = CountGraphs()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    s = torch.full((4,), 0.4)
    for length in range(3, 40):
        q, k, v = tensors(length, length)
        torch.testing.assert_close(compiled(q, k, v, s), run(q, k, v, s))
    assert backend.graphs <= 2


def padding(k):
    return (torch.arange(k.shape[2]) > 1)[None, None, None]


DYNAMIC = {
    "causal": lambda q, k, v, s, x: attention(q, k, v, s, is_causal=True),
    "two sides": lambda q, k, v, s, x: attention(q, k, v, s),
    "s and b numbers": lambda q, k, v, s, x: attention(q, k, v, x, x, is_causal=True),
    "b a number": lambda q, k, v, s, x: attention(q, k, v, s, x, is_causal=True),
    "scale": lambda q, k, v, s, x: attention(q, k, v, s, scale=x, is_causal=True),
    "n an integer": lambda q, k, v, s, x: attention(q, k, v, x, n=k.shape[2], is_causal=True),
    "n a number": lambda q, k, v, s, x: attention(q, k, v, s, n=10 * x, is_causal=True),
    "n a tensor": lambda q, k, v, s, x: attention(q, k, v, s, n=torch.arange(q.shape[2]) + 1, is_causal=True),
    "mask": lambda q, k, v, s, x: attention(q, k, v, s, attn_mask=padding(k).expand(2, 1, k.shape[2], -1)),
    "padding": lambda q, k, v, s, x: attention(q, k, v, s, attn_mask=padding(k), is_causal=True),
    "bias": lambda q, k, v, s, x: attention(q, k, v, s, n=k.shape[2], attn_mask=x + padding(k).float()),
    "window": lambda q, k, v, s, x: attention(q, k, v, s, is_causal=True, window=5),
    "window of the length": lambda q, k, v, s, x: attention(q, k, v, s, is_causal=True, window=k.shape[2] // 2),
    "prefill in chunks": lambda q, k, v, s, x: attention(q[:, :, 2:], k, v, s, is_causal=True),
    "grouped": lambda q, k, v, s, x: attention(q, k[:, :2], v[:, :2], s, is_causal=True, enable_gqa=True),
    "packed": lambda q, k, v, s, x: attention(
        q[:1], k[:1], v[:1], s, is_causal=True, cu_seqlens=torch.stack([torch.tensor(at) for at in (0, 3, 4)])
    ),
    "softcap": lambda q, k, v, s, x: attention(q, k, v, s, is_causal=True, softcap=5 + x),
    "reference": lambda q, k, v, s, x: attention(q, k, v, x, x, scale=x, is_causal=True, impl="reference"),
    "flex with a softcap": lambda q, k, v, s, x: attention(q, k, v, s, is_causal=True, softcap=5 + x, impl="flex"),
    "the module": lambda q, k, v, s, x: SCALE(q, visible_keys(num_keys=k.shape[2], window=3)),
    "the function": lambda q, k, v, s, x: ssmax.scalable_softmax(q @ k.mT, x, x, n=k.shape[2]),
}


@pytest.mark.parametrize("run", DYNAMIC.values(), ids=DYNAMIC)
def test_dynamic_shapes_and_numbers(run):
    """torch.compile(dynamic=True) makes symbols of lengths and of numbers; two graphs serve all of them."""
    backend = CountGraphs()
    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    s = torch.full((4,), 0.4)
    for length in (4, 5, 9, 66):
        call = (*tensors(length, length), s, 0.1 + length / 100)
        torch.testing.assert_close(compiled(*call), run(*call))
    assert backend.graphs <= 2


def test_two_graphs_serve_64_lengths_of_dynamic_shapes():
    backend = CountGraphs()
    run = torch.compile(
        lambda q, k, v, x: attention(q, k, v, x, is_causal=True), backend=backend, fullgraph=True, dynamic=True
    )
    for length in range(3, 67):
        q, k, v = tensors(length, length)
        torch.testing.assert_close(run(q, k, v, length / 50), attention(q, k, v, length / 50, is_causal=True))
    assert backend.graphs <= 2


def test_the_module_and_n_from_positions_are_one_graph():
    scale = SSMaxScale(4, bias=True)
    query = torch.randn(2, 4, 6, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])

    def run(query, positions):
        return scale(query, visible_keys(position_ids=positions, window=3))

    backend = CountGraphs()
    torch.testing.assert_close(
        torch.compile(run, backend=backend, fullgraph=True)(query, positions), run(query, positions)
    )
    assert backend.graphs == 1


def test_inference_first_then_training():
    q, k, v = tensors(5, 5)
    s = torch.full((4,), 0.4, requires_grad=True)
    run = torch.compile(lambda s: attention(q, k, v, s, is_causal=True), backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        run(s)
    run(s).sum().backward()
    assert s.grad.abs().max() > 0


PEAK = """
import resource, torch
from ssmax import attention
torch.set_num_threads(1)
q, k, v = (torch.randn(1, {heads}, 16384, {size}, requires_grad=True) for _ in range(3))
warm = [x.detach()[:, :, :600].requires_grad_() for x in (q, k, v)]
s = torch.full(({heads},), 0.43, requires_grad=True)
def plain(q, k, v): return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
def causal(q, k, v): return attention(q, k, v, s, is_causal=True)
def window(q, k, v): return attention(q, k, v, s, is_causal=True, window={window})
def packed(q, k, v):
    return attention(q, k, v, s, is_causal=True, cu_seqlens=torch.tensor([0, q.shape[2] // 2 - 40, q.shape[2] - 3]))
{name}(*warm).sum().backward()
{name}(q, k, v).square().sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, q.numel() * 4)
"""


def peak(name, **shape):
    script = PEAK.format(name=name, **{"window": 0, **shape})
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [int(x) for x in done.stdout.split()]


@pytest.mark.parametrize(("heads", "size"), [(2, 64), (4, 32)])
def test_memory_beyond_plain_attention_is_below_three_queries(heads, size):
    plain, query = peak("plain", heads=heads, size=size)
    for layout in (
        {"name": "causal"},
        {"name": "packed"},
        {"name": "window", "window": 256},
        {"name": "window", "window": 2048},
    ):
        ours, _ = peak(**layout, heads=heads, size=size)
        assert ours - plain < 3 * query, layout


def kernels_of_a_layer(model, length):
    """How many kernels inductor makes of the first attention layer, and the sizes of the buffers between them."""
    layer, x = model.model.layers[0].self_attn, torch.randn(2, length, model.config.hidden_size)
    cos, sin = model.model.rotary_emb(x, torch.arange(length)[None])
    torch._dynamo.reset()
    metrics.reset()
    compiled = torch.compile(lambda x, cos, sin: layer(x, (cos, sin), None)[0], fullgraph=True)
    with torch.no_grad():
        got, (code,) = run_and_get_code(compiled, x, cos, sin)
        torch.testing.assert_close(got, layer(x, (cos, sin), None)[0])
    shapes = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", code)
    return metrics.generated_kernel_count, [math.prod(map(int, shape.rstrip(", ").split(","))) for shape in shapes]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_scale_and_rope_and_qk_norm_are_one_pass_over_the_query(family):
    """Converted, a layer has one kernel more, which computes log n for the rows, and no further buffer of the query's size.

    Batch 2: with batch 1 inductor (torch 2.13) stores the rotation of the key apart as well, which costs nothing for the query.
    """
    model, length = tiny_model(family), 48
    kernels, buffers = kernels_of_a_layer(model, length)
    ssmax.convert(model, bias=True)
    converted_kernels, converted_buffers = kernels_of_a_layer(model, length)
    assert converted_kernels == kernels + 1
    assert length in converted_buffers
    assert length not in buffers
    query = 2 * length * model.config.num_attention_heads * model.config.head_dim
    assert converted_buffers.count(query) == buffers.count(query) > 0
