"""Draw the pictures of what-n-is.md: python docs/pictures.py. Each n beside a picture is what visible_keys returns."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from ssmax import visible_keys

HERE = Path(__file__).parent / "images"
SEEN, HIDDEN, PAD = "#0072b2", "#f1f1f1", "#d9d9d9"
causal = np.tril(np.ones((8, 8), dtype=bool))


def padded(real, table=causal):
    return table & np.array(real, dtype=bool)


def packed(lengths):
    document = np.repeat(np.arange(len(lengths)), lengths)
    return causal & (document[:, None] == document)


def position_gap(low, high):
    gap = np.arange(8)[:, None] - np.arange(8)
    return (gap >= low) & (gap < high)


LEFT, RIGHT = [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]
PREFIX = causal | (np.arange(8) < 3)
TREE = np.eye(8, dtype=bool)
for node, parent in enumerate([None, 0, 0, 1, 1, 2, 4, 4]):
    TREE[node] |= TREE[parent] if parent is not None else False
CHUNKS = causal & (np.arange(8)[:, None] // 3 == np.arange(8) // 3)

# name: (table of visible keys, arguments of visible_keys, padding columns)
LAYOUTS = {
    "causal": (causal, {"num_keys": 8}, []),
    "left-padding": (padded(LEFT), {"mask": torch.tensor([LEFT])}, [0, 1, 2]),
    "right-padding": (padded(RIGHT), {"mask": torch.tensor([RIGHT])}, [5, 6, 7]),
    "packed": (packed([3, 1, 4]), {"cu_seqlens": torch.tensor([0, 3, 4, 8])}, []),
    "window": (causal & position_gap(0, 3), {"num_keys": 8, "window": 3}, []),
    "chunks": (CHUNKS, {"num_keys": 8, "chunk": 3}, []),
    "decode": (causal[-1:], {"num_keys": 8, "num_queries": 1}, []),
    "chunked-prefill": (causal[-3:], {"num_keys": 8, "num_queries": 3}, []),
    "static-cache": (padded(RIGHT, causal[4:5]), {"mask": torch.tensor(padded(RIGHT, causal[4:5]))[None, None]}, [5, 6, 7]),
    "cross": (padded(RIGHT, np.ones((4, 8), dtype=bool)), {"mask": torch.tensor([RIGHT]), "num_queries": 4, "causal": False}, [5, 6, 7]),
    "prefix": (PREFIX, {"mask": torch.tensor(PREFIX)[None, None]}, []),
    "tree": (TREE, {"mask": torch.tensor(TREE)[None, None]}, []),
    "shard": (causal[[2, 3, 6, 7]], {"position_ids": torch.tensor([[2, 3, 6, 7]])}, []),
}  # fmt: skip


def draw(name):
    table, arguments, pads = LAYOUTS[name]
    n = visible_keys(**arguments)[0].tolist()
    assert n == table.sum(1).tolist(), name
    rows, keys = table.shape
    figure = Figure(figsize=(0.34 * (keys + 3), 0.34 * (rows + 1.6)))
    axis = figure.add_axes((0, 0, 1, 1))
    for row in range(rows):
        for key in range(keys):
            colour = SEEN if table[row, key] else PAD if key in pads else HIDDEN
            axis.add_patch(matplotlib.patches.Rectangle((key, row), 0.9, 0.9, color=colour, lw=0))
        axis.text(keys + 0.4, row + 0.45, f"n = {n[row]}", va="center", fontsize=8)
    axis.text(0, -0.3, "keys →   (one row a query)", fontsize=7, color="0.4")
    axis.set(xlim=(-0.2, keys + 2.6), ylim=(rows + 0.1, -1.0))
    axis.axis("off")
    with matplotlib.rc_context({"svg.hashsalt": "ssmax"}):
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for layout in LAYOUTS:
        draw(layout)
