"""Compile the kernels of impl="triton" for GPUs that are not there; print the shared memory of each in bytes.

Run by test_triton.py, in a process of its own.
"""

import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssmax.backends import triton as kernels

OF_ROWS = ("M", "LOGSUMEXP", "MEAN_Z", "ROW_GRAD", "DM")


def compiled(kernel, tile, size, dtype, architecture, **flags):
    flags = {"CAUSAL": True, "WINDOW": False, "PACKED": False, **flags}
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"D": size, "E": size, **flags, **tile}
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


KERNELS = {"forward": kernels.forward_kernel, "query": kernels.query_kernel, "key": kernels.key_kernel}
CASES = [
    (64, torch.bfloat16, 90, {"WINDOW": True, "PACKED": True}),
    (128, torch.bfloat16, 90, {}),
    (128, torch.bfloat16, 80, {}),
    (64, torch.float32, 80, {}),
]
for size, dtype, architecture, flags in CASES:
    for name, kernel in KERNELS.items():
        result = compiled(kernel, kernels.tiles(size, dtype)[name], size, dtype, architecture, **flags)
        assert ".entry" in result.asm["ptx"]
        print(name, size, dtype, f"sm_{architecture}", result.metadata.shared, flush=True)
