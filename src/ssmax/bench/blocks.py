"""An upper bound of what a prefill could save by skipping blocks of keys, if all scores were known at no cost."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ssmax.bench.measure import row
from ssmax.data.sources import documents
from ssmax.demo import measure as demo
from ssmax.runs.rows import Row

CONTEXT, CHUNK, KEYS = 24_000, 1000, 64
ROWS = (1, 16, 64)
TOLERANCE = 1e-3


@torch.inference_mode()
def measurements() -> Iterator[Row]:
    """Yield the share of blocks of 64 keys that the last 1, 16 and 64 rows need, by head, for the SSMax models that ship."""
    shipped = demo.load()
    tokens = torch.tensor([shipped.encode("\n".join(documents(None, 8 * CONTEXT)[0]))[:CONTEXT]])
    for name, models in (("pretrained", shipped.pretrained), ("retrieval", shipped.retrieval)):
        model: Any = models["ssmax"]
        cache: Any = DynamicCache(config=model.config)
        queries: dict[int, Tensor] = {}
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.ssmax.register_forward_hook(functools.partial(_keep, queries, index))
        for part in tokens.split(CHUNK, 1):
            model.base_model(part, past_key_values=cache)
        for index, layer in enumerate(cache.layers):
            scores = queries[index][0, :, -max(ROWS) :] @ layer.keys[0].mT * layer.keys.shape[-1] ** -0.5
            for rows in ROWS:
                for head, share in enumerate(needed(scores[:, -rows:]).tolist()):
                    at = {"model": name, "layer": index, "head": head, "rows": rows}
                    yield row("share_of_blocks_needed", "ssmax", at, share, 1)


def _keep(queries, index, module, inputs, scaled):
    queries[index] = scaled


def needed(scores: Tensor) -> Tensor:
    """Return the share of blocks of keys in which some row has a key that sharp decoding must read, (H,).

    Args:
        scores: (H, R, S), of the last R of S causal positions, multiplied by s log n.
    """
    _, rows, keys = scores.shape
    hidden = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    scores = scores.masked_fill(hidden, -math.inf)
    kept = scores >= scores.amax(-1, keepdim=True) + math.log(TOLERANCE / keys)
    blocks = torch.nn.functional.pad(kept, (0, -keys % KEYS)).unflatten(-1, (-1, KEYS)).any(-1)
    return blocks.any(1).double().mean(-1)
