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
NETWORK_RATE = 50e9  # bytes a second that a device sends to another node, 400 Gbit/s
KEPT = 0.01
LONG, SPREAD = (10**6, 10**7, 10**8), (1, 8, 32, 256, 1024)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of heads that are sharp
BATCHES = (1, 16)

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


def contexts() -> str:
    rows = []
    for n in LONG:
        for count in SPREAD:
            time = M.training_flops(n) / PEAK / count
            ulysses = M.ulysses_bytes(n, count) if count <= M.heads else None  # it divides heads
            moved = 4 * M.layers * M.query_bytes(n) / count / MEMORY_RATE
            rows.append(
                [
                    f"{n:,}",
                    f"{count:,}",
                    seconds(time),
                    _sent(M.ring_bytes(n, count), time),
                    "more devices than heads" if ulysses is None else _sent(ulysses, time),
                    f"{moved / time:.4%}",
                    size(M.layers * M.query_bytes(n) / count),
                    f"{M.scale_bytes(count):,} B",
                ]
            )
    head = [
        "tokens",
        "devices",
        "a step's compute",
        "ring sends",
        "Ulysses sends",
        "scaling unfused adds",
        "and keeps",
        "s sends",
    ]
    return table(head, rows)


def _sent(number, time):
    """Bytes, and their time at the network's rate over the step's: what hides behind the compute."""
    return "0" if number == 0 else f"{size(number)} ({number / NETWORK_RATE / time:.1%})"


def measured_ratios() -> dict[int, tuple[float, float]]:
    """Time of sharp decoding over plain by keys, for peaked and flat heads."""
    found = {}
    for row in read_rows(ROOT / "benchmarks" / "results" / "decode.jsonl"):
        if row.metric == "time_ratio" and row.variant == "ssmax, sharp":
            found[row.at["keys"], row.at["scores"]] = row.value
    return {keys: (found[keys, "peaked"], found[keys, "flat"]) for keys in sorted({keys for keys, _ in found})}


def fleet() -> str:
    rows = []
    for keys, (sharp, flat) in measured_ratios().items():
        for batch in BATCHES:
            cache = batch * M.cache_bytes(keys)
            attention = cache / (M.multiplied * M.number + cache)
            gains = [1 / (1 - attention + attention * ((1 - f) * max(1.0, flat) + f * sharp)) for f in SHARES]
            rows.append(
                [
                    f"{keys:,}",
                    str(batch),
                    f"{attention:.0%}",
                    f"{sharp:.2f}",
                    f"{flat:.2f}",
                    *(f"{gain:.2f}" for gain in gains),
                ]
            )
    head = ["keys", "sequences", "attention's share a", "r", "c", *(f"f = {f:.0%}" for f in SHARES)]
    return table(head, rows)


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

## Context parallelism

One sequence over many devices: a training step's compute, what one device sends in a forward (and its time at 50 GB/s, as a
share of the step: below 100 % it can hide), and what SSMax adds: the unfused scaling, one more query kept, and the all-reduce of
s's gradient. n needs nothing: it is the position of the query in the whole sequence.

{contexts()}

`examples/context_parallel.py` runs both on simulated ranks in one process: SSMaxScale with global n and ring blocks, attention()
on a part of the heads for Ulysses. `tests/cli/test_scale.py` compares outputs, all gradients and the bytes sent with one device and
with these formulae, on 1 to 4 ranks, and sees local positions and gradients of s that are not summed fail.

## A served fleet

A decode step reads weights once and each sequence's cache: attention takes the share a of it. If a share f of the heads is sharp, takes
r of its time, and the others c, a step takes 1 − a + a ((1 − f) c + f r), and a fleet serves the inverse of that in tokens. r and c are
measured (`ssmax bench decode`, peaked and flat, one CPU); a is that of the model above, by bytes. Layers without sharp heads
decode plainly after 256 steps of a SharpCache, and there c is 1. No GPU kernel of sharp decoding exists yet, so for GPUs
this is what one would be worth if it did as well.

{fleet()}

## What was measured

`ssmax bench scale --out benchmarks/results`, on a CPU: FLOP by torch's counter and bytes of tensors on a small Llama, the
query kept in training by torch's profiler, times as growth between two sizes.

{checks()}
"""

if __name__ == "__main__":
    write_atomically(ROOT / "docs" / "scale.md", PAGE)
