"""impl="triton": on a GPU its errors and times beside the best plain flash kernel there; anywhere its gradient of s.

    python benchmarks/kernel.py gpu                              needs a GPU; benchmarks/results/kernel.jsonl
    TRITON_INTERPRET=1 python benchmarks/kernel.py gradient      float16, on any CPU; benchmarks/results/kernel-gradient.jsonl

Times are bfloat16, causal, in alternation in one process, medians and quartiles of the rounds' ratios. Errors are relative
(L2) against float64 with the same inputs: the kernel's against float64 SSMax, the plain kernel's against float64 softmax.
"""

import os
import platform
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import ssmax
from ssmax import attention
from ssmax.runs.rows import Row, write_rows

RESULTS = Path(__file__).parent / "results"
S, ROUNDS, OURS = 0.43, 12, "ssmax triton"
PLAIN = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def tensors(length, heads, size, dtype, device):
    generator = torch.Generator().manual_seed(length)
    shape = (1, heads, length, size)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]


def gradients(call, inputs, upstream):
    """Return the output and the gradients of all inputs, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = call(*leaves)
    return [x.detach().double() for x in (output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype)))]


def errors(got, exact):
    return [((mine - truth).norm() / truth.norm()).item() for mine, truth in zip(got, exact, strict=True)]


def plain(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def gpu():
    """Errors at 4,096 tokens; forward, and forward + backward, at 4,096 to 32,768 tokens."""
    if not torch.cuda.is_available():
        sys.exit("kernel.py gpu needs a GPU and the package triton; there is no GPU here")
    rows = []
    for size in (64, 128):
        rows += errors_on_gpu(4096, size)
        for length in (4096, 8192, 16384, 32768):
            rows += [time_on_gpu(length, size, passes) for passes in ("forward", "forward + backward")]
    return "kernel", rows


def errors_on_gpu(length, size, device="cuda"):
    q, k, v, upstream = tensors(length, 4, size, torch.bfloat16, device)
    s, b = (torch.full((4,), x, device=device) for x in (S, 0.0))
    wide, scales = [x.double() for x in (q, k, v)], [s.double(), b.double()]
    ours = gradients(lambda *x: attention(*x, is_causal=True, impl="triton"), [q, k, v, s, b], upstream)
    exact = gradients(lambda *x: attention(*x, is_causal=True, impl="reference"), wide + scales, upstream)
    theirs = gradients(plain, [q, k, v], upstream)
    softmax = gradients(lambda q, k, v: attention(q, k, v, 0, 1, is_causal=True, impl="reference"), wide, upstream)
    rows = []
    for variant, found in ((OURS, errors(ours, exact)), ("plain", errors(theirs, softmax))):
        for of, error in zip(("output", "dq", "dk", "dv", "ds", "db"), found, strict=False):
            rows.append(row("error", variant, {"of": of, "length": length, "head_size": size}, error, 1, card()))
            show(f"{length} tokens, heads of {size}: {variant}, {of}", f"{error:.2e}")
    return rows


def time_on_gpu(length, size, passes, device="cuda"):
    from triton.testing import do_bench

    *inputs, upstream = tensors(length, 16, size, torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in inputs]
    s = torch.full((16,), S, device=device, requires_grad=True)

    def work(call, backends):
        def run():
            with sdpa_kernel(backends):
                output = call()
            if passes != "forward":
                output.backward(upstream)

        return run

    contenders = {name: work(lambda: plain(*leaves), backend) for name, backend in PLAIN.items()}
    contenders = {name: call for name, call in contenders.items() if works(call)}
    contenders[OURS] = work(lambda: attention(*leaves, s, is_causal=True, impl="triton"), list(PLAIN.values()))
    times = {name: [] for name in contenders}
    for turn in range(ROUNDS):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            times[name].append(do_bench(contenders[name], grad_to_none=[*leaves, s], return_mode="median"))
    best = min(times.keys() - {OURS}, key=lambda name: statistics.median(times[name]))
    of_rounds = [mine / other for mine, other in zip(times[OURS], times[best], strict=True)]
    low, middle, high = statistics.quantiles(of_rounds, n=4)
    show(f"{length} tokens, 16 heads of {size}, {passes}, over {best}", f"{middle:.3f} ({low:.3f} to {high:.3f})")
    at = {"length": length, "head_size": size, "passes": passes, "over": best, "low": low, "high": high}
    return row("time_ratio", OURS, at, middle, ROUNDS, card())


def works(call):
    """Whether this card and version have that kernel."""
    try:
        call()
    except RuntimeError:
        return False
    return True


def card():
    return torch.cuda.get_device_name()


def gradient():
    """Relative error of the gradients of s and b in float16: this kernel in the interpreter beside torch's kernel."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("kernel.py gradient needs TRITON_INTERPRET=1 in the environment")
    rows, length, heads = [], 1024, 4
    for scores in ("random", "competing", "peaked"):
        q, k, v, upstream = (x.double() for x in tensors(length, heads, 64, torch.float64, "cpu"))
        for lag in range({"random": 0, "competing": 4, "peaked": 1}[scores]):
            # One key of each query leads by much, or four of them by little.
            target = (torch.arange(length) * 7 + lag * 13) % (torch.arange(length) + 1)
            q = q + k[:, :, target] * (0.5 if scores == "competing" else 1.0)
        q, k, v, upstream = (x.half().double() for x in (q, k, v, upstream))
        s, b = torch.full((heads,), S), torch.zeros(heads)
        exact = scale_gradients("reference", [q, k, v, s.double(), b.double()], upstream)
        for variant, impl in ((OURS, "triton"), ("ssmax sdpa", "sdpa")):
            got = scale_gradients(impl, [q.half(), k.half(), v.half(), s, b], upstream)
            for name, error in zip("sb", errors(got, exact), strict=True):
                at = {"length": length, "scores": scores, "gradient": name, "dtype": "float16"}
                rows.append(
                    row("gradient_error", variant, at, error, heads, "interpreter" if impl == "triton" else "CPU")
                )
                show(f"{length} tokens, {scores}, d{name}, float16, {variant}", f"{error:.1e}")
    return "kernel-gradient", rows


def scale_gradients(impl, inputs, upstream):
    return gradients(lambda *x: attention(*x, is_causal=True, impl=impl), inputs, upstream)[-2:]


def row(metric, variant, at, value, samples, device):
    import triton

    provenance = {
        "ssmax": ssmax.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "machine": device,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Row(metric, variant, None, at, value, samples, provenance)


def show(name, value):
    print(f"{name:<75} {value}", flush=True)


if __name__ == "__main__":
    cases = {"gpu": gpu, "gradient": gradient}
    if len(sys.argv) != 2 or sys.argv[1] not in cases:
        sys.exit(__doc__)
    name, rows = cases[sys.argv[1]]()
    write_rows(RESULTS / f"{name}.jsonl", rows)
