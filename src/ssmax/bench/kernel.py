"""impl="triton" on a GPU: its errors and times beside the best plain flash kernel. Without a GPU: whether it compiles.

Times are for bfloat16, causal, measured in alternation in one process: medians and quartiles of the
rounds' ratios. Errors are relative (L2) to float64 with the same inputs: those of impl="triton" to
SSMax, those of the plain kernel to softmax.
"""

import itertools
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ssmax.bench.measure import row
from ssmax.errors import UserError
from ssmax.functional import attention
from ssmax.runs.rows import Row

S, ROUNDS, OURS = 0.43, 12, "ssmax triton"
PLAIN = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
ARCHITECTURES = (80, 90, 100)
OF_ROWS = ("M", "LOGSUMEXP", "MEAN_Z", "ROW_GRAD", "DM")
OUTPUTS = ("output", "dq", "dk", "dv", "ds", "db")


def measurements() -> Iterator[Row]:
    """Yield errors at 4,096 tokens, and times of forward and of forward + backward at 4,096 to 32,768 tokens.

    Raises:
        UserError: this machine has no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "case 'kernel' needs a GPU, and this machine has none; --dry-run compiles the kernels without one"
        )
    for size in (64, 128):
        yield from errors_on(4096, size)
        for length, passes in itertools.product((4096, 8192, 16384, 32768), ("forward", "forward + backward")):
            yield time_on(length, size, passes)


def dry_run() -> Iterator[str]:
    """Compile the kernels for several GPU architectures, without a GPU; yield a line for each."""
    from ssmax.backends import triton as host
    from ssmax.backends import triton_kernels as kernels

    named = {"forward": kernels.forward_kernel, "query": kernels.query_kernel, "key": kernels.key_kernel}
    for architecture, size, (name, kernel) in itertools.product(ARCHITECTURES, (64, 128), named.items()):
        tile = host.tiles(size, torch.bfloat16)[name]
        try:
            shared = compile_for(architecture, kernel, tile, size, torch.bfloat16).metadata.shared
        except Exception as error:  # a compiler may raise anything; the line shows it
            yield f"sm_{architecture}, heads of {size}, {name} kernel: DOES NOT COMPILE: {str(error).splitlines()[0]}"
        else:
            yield f"sm_{architecture}, heads of {size}, {name} kernel: compiles, {shared:,} bytes of shared memory"
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU here"
    yield f"{here}: no kernel was run; this check shows neither right results nor speed"


def compile_for(
    architecture: int, kernel: Any, tile: dict[str, Any], size: int, dtype: torch.dtype, **flags: bool
) -> Any:
    """Compile a kernel of triton_kernels.py as Triton does at its first call on a GPU (architecture 90: sm_90)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    flags = {"CAUSAL": True, "WINDOW": False, "PACKED": False, **flags}
    options = {name: tile[name] for name in ("num_warps", "num_stages")}
    constants = {"D": size, "E": size, **flags, "BLOCK_M": tile["BLOCK_M"], "BLOCK_N": tile["BLOCK_N"]}
    if not flags["PACKED"]:
        constants |= {"START": None, "END": None}
    constants |= {name: 1 for name in kernel.arg_names if re.fullmatch("d?[qkvo]_[de]|do_e|m_n", name)}
    narrow = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.isupper():
            signature[name] = "*fp32" if name in OF_ROWS else "*i32" if name in ("START", "END") else narrow
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if name not in constants and (name.isupper() or re.fullmatch("[a-z]+_.", name)):
            aligned[(index,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def tensors(length: int, heads: int, size: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return Gaussian query, key, value and upstream gradient, (1, heads, length, size)."""
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, heads, length, size, generator=generator).to(device, dtype) for _ in range(4)]


def gradients(call, inputs, upstream):
    """Return the output and the gradients of all inputs, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = call(*leaves)
    return [x.detach().double() for x in (output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype)))]


def errors(got, exact):
    """Return the relative error (L2) of each tensor."""
    return [((mine - truth).norm() / truth.norm()).item() for mine, truth in zip(got, exact, strict=True)]


def plain(q, k, v):
    """Plain causal attention, which the kernel is compared with."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def errors_on(length: int, size: int, device: str = "cuda") -> Iterator[Row]:
    """Yield the errors of the output and of each gradient."""
    q, k, v, upstream = tensors(length, 4, size, torch.bfloat16, device)
    s, b = (torch.full((4,), x, device=device) for x in (S, 0.0))
    wide, scales = [x.double() for x in (q, k, v)], [s.double(), b.double()]
    ours = gradients(lambda *x: attention(*x, is_causal=True, impl="triton"), [q, k, v, s, b], upstream)
    exact = gradients(lambda *x: attention(*x, is_causal=True, impl="reference"), wide + scales, upstream)
    theirs = gradients(plain, [q, k, v], upstream)
    softmax = gradients(lambda q, k, v: attention(q, k, v, 0, 1, is_causal=True, impl="reference"), wide, upstream)
    for variant, found in ((OURS, errors(ours, exact)), ("plain", errors(theirs, softmax))):
        for of, error in zip(OUTPUTS, found, strict=False):
            at = {"length": length, "head_size": size, "of": of}
            yield tagged(row("relative_error", variant, at, error, 1), device)


def time_on(length: int, size: int, passes: str, device: str = "cuda") -> Row:
    """Return the ratio of the kernel's time to that of the fastest plain kernel."""
    from triton.testing import do_bench

    q, k, v, upstream = tensors(length, 16, size, torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    s = torch.full((16,), S, device=device, requires_grad=True)

    def work(call, backends):
        def run():
            with sdpa_kernel(backends):
                output = call()
            if passes != "forward":
                output.backward(upstream)

        return run

    contenders = {name: work(lambda: plain(q, k, v), backend) for name, backend in PLAIN.items()}
    contenders = {name: call for name, call in contenders.items() if works(call)}
    contenders[OURS] = work(lambda: attention(q, k, v, s, is_causal=True, impl="triton"), list(PLAIN.values()))
    times: dict[str, list[Any]] = {name: [] for name in contenders}
    for turn in range(ROUNDS):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            times[name].append(do_bench(contenders[name], grad_to_none=[*leaves, s], return_mode="median"))
    best = min(times.keys() - {OURS}, key=lambda name: statistics.median(times[name]))
    of_rounds = [mine / other for mine, other in zip(times[OURS], times[best], strict=True)]
    low, middle, high = statistics.quantiles(of_rounds, n=4)
    at = {"length": length, "head_size": size, "pass": passes, "over": best, "low": low, "high": high}
    return tagged(row("time_ratio", OURS, at, middle, ROUNDS), device)


def works(call):
    """Return whether this GPU and this version of torch have the kernel."""
    try:
        call()
    except RuntimeError:
        return False
    return True


def tagged(made: Row, device: str = "cpu") -> Row:
    """Return a row that also names Triton's version and the GPU."""
    import triton

    more = {"triton": triton.__version__} | ({"machine": torch.cuda.get_device_name()} if device == "cuda" else {})
    return replace(made, provenance={**(made.provenance or {}), **more})
