"""Write docs/scale.md from the formulae of ssmax.bench.scale and the rows of benchmarks/results/scale.jsonl."""

from pathlib import Path

from ssmax.bench.scale import Shape
from ssmax.runs.files import write_atomically
from ssmax.runs.rows import read_rows
from ssmax.sharp.keys import MIN_KEYS

ROOT = Path(__file__).parent.parent
LENGTHS = (1024, 4096, 16384, 65536, 262144, 1048576)
DEVICES = (1, 8, 64)
# The data sheet of an H100 SXM: dense bfloat16 FLOP/s at a usual share of it, bytes a second, bytes.
PEAK, MEMORY_RATE, MEMORY = 989e12 * 0.4, 3.35e12, 80e9
KEPT = 0.01

M = Shape()


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def size(number: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:,.3g} {unit}"
    return f"{number / 1e3:,.3g} kB"


def seconds(number: float) -> str:
    return f"{number:,.3g} s" if number >= 1 else f"{number * 1e3:,.3g} ms"


def training() -> str:
    rows = []
    for n in LENGTHS:
        flops = M.training_flops(n)
        # Unfused: a query is read and written once more in the forward, and its gradient in the backward.
        extra = 4 * M.layers * M.query_bytes(n) / MEMORY_RATE
        rows.append(
            [
                f"{n:,}",
                f"{flops:.2e}",
                f"{1 - 3 * 2 * M.multiplied * n / flops:.0%}",
                seconds(flops / PEAK),
                f"{extra / (flops / PEAK):.2%}",
                size(M.layers * M.query_bytes(n)),
                size(M.layers * M.materialised_bytes(n)),
            ]
        )
    head = [
        "tokens",
        "FLOP",
        "of it attention",
        "time",
        "scaling unfused adds",
        "and keeps",
        "softmax(N x N) would keep",
    ]
    return table(head, rows)


def prefill() -> str:
    rows = [
        [
            f"{n:,}",
            f"{M.forward_flops(n):.2e}",
            seconds(M.forward_flops(n) / PEAK),
            f"{M.scaling_flops(n) / M.forward_flops(n):.1e}",
            size(M.cache_bytes(n)),
            size(M.screen_bytes(n)),
        ]
        for n in LENGTHS
    ]
    return table(["tokens", "FLOP", "time", "share of scaling", "cache", "and a screen"], rows)


def decode() -> str:
    rows = []
    for n in LENGTHS:
        plain = M.decode_bytes(n)
        sharp = M.sharp_decode_bytes(n, KEPT) if n >= MIN_KEYS else plain
        attention = (sharp - M.multiplied * M.number) / M.cache_bytes(n)
        rows.append(
            [
                f"{n:,}",
                size(plain),
                seconds(plain / MEMORY_RATE),
                size(sharp),
                f"{sharp / plain:.2f}",
                f"{attention:.2f}",
            ]
        )
    return table(["keys", "read", "time", "read, sharp", "of the step", "of its attention"], rows)


def devices() -> str:
    rows = []
    for n in LENGTHS:
        cells = [f"{n:,}"]
        for count in DEVICES:
            held = (M.parameters * M.number + M.cache_bytes(n)) / count
            cells.append(f"{size(held)}{'' if held < MEMORY else ' (too much)'}")
        rows.append([*cells, f"{M.training_flops(n) / PEAK / DEVICES[-1]:,.3g} s"])
    return table(
        [
            "tokens",
            *(f"{count} device{'s' * (count > 1)}" for count in DEVICES),
            f"a training step's share of {DEVICES[-1]}",
        ],
        rows,
    )


def heads() -> str:
    rows = []
    for kind, key_heads in (("MHA", 32), ("GQA", 8), ("MQA", 1)):
        shape = Shape(key_heads=key_heads)
        n = 131072
        kept = shape.sharp_decode_bytes(n, KEPT) - shape.multiplied * shape.number
        rows.append(
            [
                f"{kind}, {key_heads}",
                size(shape.cache_bytes(n)),
                size(shape.screen_bytes(n)),
                size(kept),
                str(shape.layers * shape.heads),
            ]
        )
    return table(["key heads", "cache at 131,072", "screen", "read by a sharp step", "values of s"], rows)


def checks() -> str:
    rows = []
    for row in read_rows(ROOT / "benchmarks" / "results" / "scale.jsonl"):
        at = "".join(f", {v:,} tokens" for k, v in row.at.items() if k == "length")
        rows.append([row.at["what"] + at, f"{row.at['formula']:,.6g}", f"{row.value:.3f}"])
    return table(["what", "formula", "measured / formula"], rows)


PAGE = f"""# Scale on paper

Made by `python docs/scale.py` from the formulae in `src/ssmax/bench/scale.py`. The model is Llama 3's shape of 8 billion
parameters (32 layers, 4,096 wide, 32 query and 8 key heads of 128), bfloat16, one sequence. **Times are computed, not
measured**: an H100 at 40 % of its dense bfloat16 peak and its full 3.35 TB/s. What could be measured, on a CPU, is at the end.

SSMax adds {M.layers * M.heads:,} numbers to {M.parameters:,}, and a multiplication for each component of a query.

## Training

A step on one sequence. "Scaling unfused": the query is read and written once more in the forward, its gradient in the
backward; it vanishes where the multiplication is fused into RoPE, QK-norm or the kernel.

{training()}

## Prefill

{prefill()}

## Decode

One token: bytes read at the memory's rate. Sharp reads the int8 screen, and keys and values of the
{KEPT:.0%} of keys that it is assumed to keep (and all of them behind fewer than 4,096, where nothing is screened); "of its
attention" leaves out the weights. Sharp decoding itself runs on CPUs only so far.

{decode()}

## Heads

{heads()}

## Devices

Weights and cache divided over devices (tensor or context parallel). SSMax needs no more communication: n is a position,
which must be the *global* one where a sequence is sharded; s is all-reduced with the other weights.

{devices()}

## What was measured

`ssmax bench scale --out benchmarks/results`, on a CPU: FLOP by torch's counter and bytes of tensors on a small Llama, the
query kept in training by torch's profiler, times as growth between two sizes.

{checks()}
"""

if __name__ == "__main__":
    write_atomically(ROOT / "docs" / "scale.md", PAGE)
