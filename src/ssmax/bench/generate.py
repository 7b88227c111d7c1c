"""generate after a real prompt: tokens a second with SharpCache and transformers' caches, and shares of keys read."""

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache

from ssmax.bench.measure import Comparison, compare, row
from ssmax.conversion import convert, revert
from ssmax.data.sources import documents
from ssmax.demo import measure as demo
from ssmax.errors import UserError
from ssmax.hf import SharpCache, sharp_cache
from ssmax.hf.loading import load_model, load_tokenizer
from ssmax.runs.rows import Row

CONTEXTS, BATCHES = (8192, 32768), (1, 4)
STEPS, ROUNDS = 16, 7  # tokens of a call of generate; rounds of them
CHUNK = 1024
SHARP, STATIC, DYNAMIC = "SharpCache", "StaticCache", "DynamicCache"


def measurements(
    model: Path | None = None, contexts: Sequence[int] = CONTEXTS, batches: Sequence[int] = BATCHES
) -> Iterator[Row]:
    """Yield rows for each context and batch: seconds and their ratio to StaticCache, tokens a second, shares of keys read.

    The prompt is the source of Python's standard library. The model without SSMax decodes after the
    same cached keys: its time does not depend on their values.

    Args:
        model: folder of a model and its tokenizer; a model without SSMax is converted in memory.
            Default: the SSMax model that ships with the package.
        contexts: tokens of a prompt.
        batches: prompts in a batch, each from another part of the text.

    Raises:
        UserError: contexts or batches below 1, a model that cannot be loaded, a text shorter than
            the prompts.
    """
    for what, numbers in (("contexts", contexts), ("batches", batches)):
        if min(numbers) < (2 if what == "contexts" else 1):
            raise UserError(f"--{what} must be {'2' if what == 'contexts' else '1'} or more, got {min(numbers)}")
    name, ours, encode = _shipped() if model is None else _given(model)
    plain = revert(copy.deepcopy(ours)).eval()
    needed = max(contexts) * max(batches)
    ids = encode("\n".join(documents(None, 8 * needed)[0]))
    if len(ids) < needed:
        raise UserError(
            f"the prompts need {needed:,} tokens, and Python's standard library has {len(ids):,}; "
            "give fewer --contexts or --batches"
        )
    for context, batch in itertools.product(contexts, batches):
        prompt = torch.tensor(ids[: batch * context]).view(batch, context)
        yield from _after(prompt, ours, plain, {"model": name, "context": context, "batch": batch})


def _shipped():
    shipped = demo.load()
    return "shipped SSMax", shipped.pretrained["ssmax"], shipped.encode


def _given(folder):
    tokenizer = load_tokenizer(folder)
    model: Any = load_model(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    if not hasattr(model.config, "ssmax"):
        model = convert(model)
    return folder.name, model, functools.partial(tokenizer.encode, add_special_tokens=False)


@torch.inference_mode()
def _after(prompt: Tensor, model: Any, plain: Any, at: dict[str, Any]) -> Iterator[Row]:
    """Compare the caches after one prompt; each holds its own copy of the keys and values."""
    context = prompt.shape[1]
    read: Any = DynamicCache(config=model.config)
    for part in prompt[:, :-1].split(CHUNK, 1):
        model.base_model(part, past_key_values=read)
    caches: dict[str, Any] = {
        DYNAMIC: read,
        STATIC: StaticCache(config=model.config, max_cache_len=context + sharp_cache.TRIAL + STEPS),
        SHARP: SharpCache(model),
    }
    for index, layer in enumerate(read.layers):
        for name in (STATIC, SHARP):
            _copy_layer(layer, caches[name], index)
    with warnings.catch_warnings():  # the rows hold what the warning says
        warnings.filterwarnings("ignore", message=".*layers are sharp")
        _generate(
            model, prompt, caches[SHARP], sharp_cache.TRIAL + 1
        )  # after this, sharp or plain is decided for each layer
        spoken = {name: _generate(model, prompt, cache, STEPS) for name, cache in caches.items()}
        for name in (STATIC, SHARP):
            equal = (spoken[name] == spoken[DYNAMIC]).double().mean().item()
            yield row("equal_tokens", name, at, equal, STEPS)
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(_generate, model, prompt, cache, STEPS) for name, cache in caches.items()
        }
        for name in (DYNAMIC, STATIC):
            calls[f"without SSMax, {name}"] = functools.partial(_generate, plain, prompt, caches[name], STEPS)
        for found in compare(Comparison(at, calls, ROUNDS, base=STATIC)):
            yield found
            if found.metric == "seconds":
                rate = len(prompt) * STEPS / found.value
                yield row("tokens_per_second", found.variant, at, rate, found.samples)
    yield from _shares(caches[SHARP], at)


def _copy_layer(layer: Any, cache: Any, index: int) -> None:
    """Copy a layer of a DynamicCache into another cache."""
    if not layer.is_sliding or layer.cumulative_length < layer.sliding_window:
        cache.update(layer.keys, layer.values, index)
    elif isinstance(cache, StaticCache):
        # A full static layer holds one key more: the one that the next step drops.
        cache.update(pad(layer.keys, (0, 0, 1, 0)), pad(layer.values, (0, 0, 1, 0)), index)
        own: Any = cache.layers[index]
        own.cumulative_length_int = layer.cumulative_length
    else:
        cache.layers[index] = copy.deepcopy(layer)


def _generate(model: Any, prompt: Tensor, cache: Any, steps: int) -> Tensor:
    """Generate a number of tokens after the prompt. Afterwards the cache is as before, without the prompt's last token."""
    # A window drops keys, so that its layer cannot be cropped.
    windows = {index: copy.deepcopy(layer) for index, layer in enumerate(cache.layers) if layer.is_sliding}
    options = {
        "max_new_tokens": steps,
        "min_new_tokens": steps,
        "do_sample": False,
        "pad_token_id": 0,
        "use_cache": True,
    }
    spoken = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options)
    for index, layer in enumerate(cache.layers):
        if index in windows:
            cache.layers[index] = windows[index]
        elif isinstance(cache, StaticCache):  # has no crop
            layer.cumulative_length.fill_(prompt.shape[1] - 1)
        else:
            layer.crop(-steps)
    return spoken[:, prompt.shape[1] :]


def _shares(cache, at):
    """Yield each layer's share of keys read exactly: mean over steps and heads, smallest and largest head, sharp or plain."""
    for index, shares in cache.share_read().items():
        by_head = shares.mean(0)
        kind = "sharp" if cache.layers[index].sharp else "plain"
        place = {**at, "layer": index, "kind": kind, "low": by_head.min().item(), "high": by_head.max().item()}
        place["heads"] = [round(share, 5) for share in by_head.tolist()]
        yield row("share_of_keys_read", SHARP, place, by_head.mean().item(), cache.layers[index].screened.steps)
