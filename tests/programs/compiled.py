"""Compile the kernels of impl="triton" for GPUs that are not there; print the shared memory of each in bytes.

Run by test_triton.py, in a process of its own.
"""

import torch

from ssmax.backends import triton as host
from ssmax.backends import triton_kernels as kernels
from ssmax.bench.kernel import compile_for

KERNELS = {"forward": kernels.forward_kernel, "query": kernels.query_kernel, "key": kernels.key_kernel}
CASES = [
    (64, torch.bfloat16, 90, {"WINDOW": True, "PACKED": True}),
    (128, torch.bfloat16, 90, {}),
    (128, torch.bfloat16, 80, {}),
    (128, torch.bfloat16, 100, {}),
    (64, torch.float32, 80, {}),
]
for size, dtype, architecture, flags in CASES:
    for name, kernel in KERNELS.items():
        result = compile_for(architecture, kernel, host.tiles(size, dtype)[name], size, dtype, **flags)
        assert ".entry" in result.asm["ptx"]
        print(name, size, dtype, f"sm_{architecture}", result.metadata.shared, flush=True)
