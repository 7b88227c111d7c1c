"""impl="triton": flash attention with the multiplier inside the kernel. The kernels are in triton_kernels.py.

This project has not yet run it on a GPU. It is tested in Triton's interpreter, and compiled for
sm_80, sm_90 and sm_100.

Shapes: N queries, S keys, D head size of query and key, E of value; BLOCK_M rows and BLOCK_N keys
make a tile.
"""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmax.backends.call import AttentionCall


def why_not(call: AttentionCall) -> str | None:
    """Return why the kernels cannot compute the call, or what is missing to run them."""
    query, sizes = call.query, sorted({call.query.shape[-1], call.value.shape[-1]})
    refused = {
        "an attn_mask": call.mask is not None,
        "a softcap": call.softcap is not None,
        "dropout": call.dropout_p > 0,
        str(query.dtype): query.dtype not in (torch.float16, torch.bfloat16, torch.float32),
        f"head sizes {sizes}": any(size not in (16, 32, 64, 128, 256) for size in sizes),
        f"tensors on {query.device.type} (it runs there with TRITON_INTERPRET=1 only)": query.device.type != "cuda"
        and not _interpreted(),
        "anything without the package triton (pip install triton)": importlib.util.find_spec("triton") is None,
    }
    what = next((what for what, found in refused.items() if found), None)
    return what and (
        f"does not compute {what}; it takes is_causal, window and cu_seqlens, float16, bfloat16 and "
        "float32, head sizes 16, 32, 64, 128 and 256, on a GPU. Use impl='auto'"
    )


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def forward(call: AttentionCall) -> Tensor:
    """Compute the output by one kernel; the backward runs two more."""
    query, key, window, start, end = call.query, call.key, call.window, None, None
    if call.cu_seqlens is not None:
        _, start, end = (bound.int() for bound in call.documents())
    window = None if window is None else min(window, key.shape[2])
    inputs = (query, key, call.value)
    if _interpreted() and query.dtype == torch.bfloat16:
        inputs = (x.float() for x in inputs)  # the interpreter's bfloat16 tl.dot is wrong
    m_BHN = call.multiplier.expand(query.shape[:3])
    return _Attention.apply(*inputs, m_BHN, start, end, call.is_causal, window, call.scale).to(query.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        multiplier: Tensor,
        start: Tensor | None,
        end: Tensor | None,
        is_causal: bool,
        window: int | None,
        scale: float,
    ) -> Tensor:
        from ssmax.backends.triton_kernels import forward_kernel

        size, value_size = query.shape[-1], value.shape[-1]
        output = torch.empty_like(query) if value_size == size else query.new_empty(*query.shape[:3], value_size)
        logsumexp, mean_z = (torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) for _ in range(2))
        shape: dict[str, Any] = {
            "heads": query.shape[1],
            "groups": query.shape[1] // key.shape[1],
            "num_queries": query.shape[2],
            "num_keys": key.shape[2],
            "window": window or 0,
            "scale": scale,
            "CAUSAL": is_causal,
            "WINDOW": window is not None,
            "PACKED": start is not None,
            "D": size,
            "E": value_size,
        }
        tile = tiles(max(size, value_size), query.dtype)
        grid = (-(-query.shape[2] // tile["forward"]["BLOCK_M"]) * query.shape[0] * query.shape[1],)
        with torch.cuda.device_of(query):
            forward_kernel[grid](
                query, key, value, multiplier, start, end, output, logsumexp, mean_z,
                *query.stride(), *key.stride(), *value.stride(), *multiplier.stride(), *output.stride(),
                **shape, **tile["forward"],
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, multiplier, start, end, output, logsumexp, mean_z)
        ctx.shape, ctx.tile = shape, tile
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        from ssmax.backends.triton_kernels import key_kernel, query_kernel

        query, key, value, multiplier, start, end, output, logsumexp, mean_z = ctx.saved_tensors
        (grad,) = grad_outputs
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        d_multiplier, row_grad = torch.empty_like(logsumexp), torch.empty_like(logsumexp)
        strides = (*query.stride(), *key.stride(), *value.stride(), *multiplier.stride(), *grad.stride())
        rows = -(-query.shape[2] // ctx.tile["query"]["BLOCK_M"]) * query.shape[0] * query.shape[1]
        keys = -(-key.shape[2] // ctx.tile["key"]["BLOCK_N"]) * key.shape[0] * key.shape[1]
        with torch.cuda.device_of(query):
            query_kernel[(rows,)](
                query, key, value, multiplier, start, end, grad, output, logsumexp, mean_z, row_grad,
                d_query, d_multiplier, *strides, *output.stride(), *d_query.stride(),
                **ctx.shape, **ctx.tile["query"],
            )  # fmt: skip
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                key_kernel[(keys,)](
                    query, key, value, multiplier, start, end, grad, logsumexp, row_grad,
                    d_key, d_value, *strides, *d_key.stride(), *d_value.stride(),
                    **ctx.shape, **ctx.tile["key"],
                )  # fmt: skip
        return d_query, d_key, d_value, d_multiplier, None, None, None, None, None


def tiles(size: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Return tile, warps and pipeline stages of each kernel, with at most 99 KiB of shared memory up to sm_90."""
    if dtype == torch.float32:  # its products run without tensor cores
        rows = keys = 16 if size > 128 else 32
        forward_tile = query_tile = key_tile = (rows, keys, 4 if size > 128 else 8, 1)
    elif size <= 64:
        forward_tile, query_tile, key_tile = (128, 64, 8, 3), (128, 32, 4, 3), (32, 128, 8, 3)
    elif size <= 128:
        forward_tile, query_tile, key_tile = (128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2)
    else:
        forward_tile, query_tile, key_tile = (64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return {
        kernel: dict(zip(names, tile, strict=True))
        for kernel, tile in (("forward", forward_tile), ("query", query_tile), ("key", key_tile))
    }
