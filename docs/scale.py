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
        "share of attention",
        "time",
        "unfused scaling adds",
        "unfused scaling keeps",
        "N x N scores would keep",
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
    return table(["tokens", "FLOP", "time", "share of scaling", "cache", "screen"], rows)


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
    return table(
        ["keys", "bytes read", "time", "bytes read, sharp", "sharp / plain, step", "sharp / plain, attention"], rows
    )


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
            f"time of a training step on {DEVICES[-1]}",
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
    return table(
        ["key heads", "cache of 131,072 keys", "screen", "cache and screen read by a sharp step", "values of s"], rows
    )


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
        "compute time of a step",
        "ring sends",
        "Ulysses sends",
        "unfused scaling adds",
        "unfused scaling keeps",
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
    head = ["keys", "sequences", "share of attention a", "r", "c", *(f"f = {f:.0%}" for f in SHARES)]
    return table(head, rows)


def checks() -> str:
    rows = []
    for row in read_rows(ROOT / "benchmarks" / "results" / "scale.jsonl"):
        at = "".join(f", {v:,} tokens" for k, v in row.at.items() if k == "length")
        rows.append([row.at["what"] + at, f"{row.at['formula']:,.6g}", f"{row.value:.3f}"])
    return table(["what", "formula", "measured / formula"], rows)


PAGE = f"""# Cost at scale

`python docs/scale.py` writes this page from the formulae in `src/ssmax/bench/scale.py`. The model has the shape of Llama 3 with 8 billion
parameters: 32 layers, width 4,096, 32 query heads and 8 key heads of 128, in bfloat16. There is one sequence. **Times are computed, not
measured**: for an H100 at 40 % of its dense bfloat16 peak, with its full memory rate of 3.35 TB/s. The [last section](#what-was-measured)
compares the formulae with measurements on a CPU.

SSMax adds {M.layers * M.heads:,} numbers to the model's {M.parameters:,}, and one multiplication for each component of a query.

## Training

A training step on one sequence. "Unfused scaling" reads and writes the query once more in the forward, and its gradient in the backward, and
keeps one more query. This cost disappears if the multiplication is fused into RoPE, QK-norm or the kernel. The last column is what
attention would keep if it wrote out its N x N scores.

{training()}

## Prefill

{prefill()}

## Decode

A step computes one token. Its time is that of reading the weights and the cache. [Sharp decoding](numbers.md#sharp-decoding) reads the int8
screen, and the keys and values of the {KEPT:.0%} of keys that it is assumed to keep. With fewer than 4,096 keys it reads all of them. "Sharp / plain,
attention" leaves out the model's weights. So far sharp decoding runs on CPUs only.

{decode()}

## Heads

{heads()}

## Devices

Memory of each device if weights and cache are divided over devices (tensor or context parallelism). SSMax needs no more communication: n is
the position plus one, and the gradient of s is all-reduced with the other gradients. If a sequence is split, the position must be the
*global* one.

{devices()}

## Context parallelism

One sequence is split over many devices. The table shows the compute time of a training step, and what one device sends in a forward. In
brackets is the time of sending at 50 GB/s, as a share of the step; below 100 % it can overlap with the computation. SSMax adds the unfused
scaling, one more query to keep, and the all-reduce of the gradient of s. n needs no communication: it is the query's position in the whole
sequence, plus one.

{contexts()}

`examples/context_parallel.py` runs both methods on simulated ranks in one process. Ring attention uses SSMaxScale with global n; Ulysses
uses attention() on a part of the heads. On 1 to 4 ranks, `tests/cli/test_scale.py` compares outputs and all gradients with one device, and
the bytes sent with these formulae. It also checks that local positions, or gradients of s that are not summed, give wrong results.

## A served fleet

How many more tokens would a fleet of servers give with sharp decoding? A decode step reads the weights once, and the cache of each sequence.
Let a be attention's share of these bytes, and f the share of heads that are sharp. A sharp head takes the fraction r of its plain time, a flat
head the fraction c. Then a step takes 1 − a + a ((1 − f) c + f r) of its plain time, and the table shows the inverse: tokens over plain
decoding. r and c are measured (`ssmax bench decode`, peaked and flat, one CPU; an older one gave r = 0.58, 0.36 and 0.10). A c below 1 counts as 1.
a is computed for the model above. The table is for the first 256 steps: then SharpCache decodes plainly the layers whose heads together read more than half of their keys. Sharp decoding has no GPU kernel yet. For GPUs the table shows what a kernel
would gain if its r and c were the same.

{fleet()}

## What was measured

`ssmax bench scale --out benchmarks/results` measures on a CPU: FLOP by torch's counter and bytes of tensors, with a small Llama; the query that
training keeps, by torch's profiler; and how times grow between two sizes.

{checks()}
"""

if __name__ == "__main__":
    write_atomically(ROOT / "docs" / "scale.md", PAGE)
