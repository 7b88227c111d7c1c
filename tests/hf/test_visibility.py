"""n from the arguments of a kernel: what transformers' own code shows FlashAttention, and sequences split over ranks."""

import copy
import types

import pytest
import torch
from tiny_models import tiny_model
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import ssmax.hf
from ssmax.hf.visibility import kernel_visible_keys, sees_what_it_is_handed


def shown(rows, keys, causal, window):
    """FlashAttention's own rule for one sequence: bottom right, the window to both sides unless causal."""
    at = torch.arange(keys - rows, keys)[:, None]
    key = torch.arange(keys)
    seen = (key <= at) if causal else torch.ones(rows, keys, dtype=torch.bool)
    return seen & (key >= at - window[0]) & (key <= at + window[1]) if window[0] >= 0 else seen


def counts(q, seen):
    return seen.sum(-1).to(q.dtype)[:, None, None].expand_as(q)


def flash_attn_func(q, k, v, dropout_p=0.0, causal=False, softmax_scale=None, window_size=(-1, -1)):
    return counts(q[0], shown(q.shape[1], k.shape[1], causal, window_size))[None].expand_as(q)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, causal=False, softmax_scale=None,
    window_size=(-1, -1),
):  # fmt: skip
    out = torch.zeros_like(q)
    for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False):
        out[a:b] = counts(q[a:b], shown(b - a, d - c, causal, window_size))
    return out


@pytest.fixture
def counting_flash(monkeypatch):
    """transformers' code around FlashAttention, with kernels that answer how many keys each query sees."""
    functions = (flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    process = flash._lazy_define_process_function(flash_attn_varlen_func)
    found = (functions, (process, process))
    old = (functions[:2] + functions[3:], process)  # transformers before paged kernels
    answer = found if hasattr(flash, "_process_with_kvcache_kwargs_fn") else old
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *arguments, **options: answer)


def random_call(draw):
    """Arguments of one kernel call, of any kind that occurs."""

    def pick(*of):
        return of[int(torch.randint(len(of), (), generator=draw))]

    batch, rows = pick(1, 1, 1, 2, 3), pick(1, 2, 5, 8)
    keys = rows + pick(0, 0, 0, 3, 7)
    kwargs, mask = {"sliding_window": pick(None, None, 1, 3, 6)}, None
    kind = pick("plain", "mask", "positions", "offsets", "offsets")
    if kind == "mask":
        side = pick("left", "right", "holes")
        lengths = torch.randint(1, keys + 1, (batch, 1), generator=draw)
        place = torch.arange(keys) if side == "right" else torch.arange(keys).flip(0)
        mask = place < lengths
        if side == "holes":
            mask = mask & (torch.rand(batch, keys, generator=draw) > 0.3)
            mask[:, -1] = True
        keys += pick(0, 4) if keys > rows else 0  # a static cache longer than the mask
    if kind == "positions":
        parts = torch.randint(1, rows + 1, (4,), generator=draw)
        restarting = torch.cat([torch.arange(part) for part in parts])
        positions = pick(
            restarting[:rows], restarting.flip(0)[:rows], torch.arange(rows) + 5, torch.arange(rows) * 2,
            torch.cat([torch.arange(5, 5 + rows // 2), torch.arange(rows - rows // 2)]),
        )  # fmt: skip
        kwargs["position_ids"] = positions.expand(batch, -1)
    if kind == "offsets":
        if pick(True, False):
            batch, keys = 1, rows
        borders = torch.randint(0, batch * rows + 1, (2,), generator=draw).sort().values
        kwargs["cu_seq_lens_q"] = torch.cat([torch.tensor([0]), borders, torch.tensor([batch * rows])])
        borders = borders if keys == rows else torch.randint(0, batch * keys + 1, (2,), generator=draw).sort().values
        kwargs["cu_seq_lens_k"] = torch.cat([torch.tensor([0]), borders, torch.tensor([batch * keys])])
        if pick(True, True, False):  # without the lengths transformers does not use the offsets
            kwargs |= {"max_length_q": batch * rows, "max_length_k": batch * keys}
    return batch, rows, keys, mask, kwargs, pick(True, True, False)


@pytest.mark.parametrize("seed", range(8))
def test_n_is_what_flash_attention_is_shown(counting_flash, seed, record):
    draw = torch.Generator().manual_seed(seed)
    config = types.SimpleNamespace(_attn_implementation="flash_attention_2", dtype=torch.float64)
    for _ in range(150):
        batch, rows, keys, mask, kwargs, causal = random_call(draw)
        module = torch.nn.Module()
        module.config, module.is_causal = config, causal
        query, key = torch.zeros(batch, 1, rows, 2).double(), torch.zeros(batch, 1, keys, 2).double()
        want = flash_attention_forward(module, query, key, key, mask, **kwargs)[0][..., 0, 0]
        n, _ = kernel_visible_keys("flash_attention_2", module, query, key, mask, kwargs)
        torch.testing.assert_close(
            n.expand(batch, rows).double(), want, rtol=0, atol=0, msg=f"{mask} {kwargs} {causal}"
        )
    record("random calls of FlashAttention, n against what the kernel shows", 150)


SHARDS: dict = {}


def over_shards(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """Ring attention of ranks that are played one after the other, each twice: keys first, then the answer."""
    mine = SHARDS.setdefault(id(module), {})
    mine[tuple(SHARDS["at"].tolist())] = (SHARDS["at"], key, value)
    at = torch.cat([shard[0] for shard in mine.values()])
    key, value = (torch.cat([shard[i] for shard in mine.values()], 2) for i in (1, 2))
    seen = (at <= SHARDS["at"][:, None]) & (SHARDS["document"][at] == SHARDS["document"][SHARDS["at"]][:, None])
    if kwargs.get("sliding_window"):
        seen = seen & (at > SHARDS["at"][:, None] - kwargs["sliding_window"])
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("over_shards", over_shards)
AttentionMaskInterface.register("over_shards", sdpa_mask)


def sharded_logits(model, ids, positions, shards):
    SHARDS.clear()
    SHARDS["document"] = (positions == 0).cumsum(0)
    model.set_attn_implementation("over_shards")
    for _ in range(3):  # every layer's keys are right once the layers before have seen all shards
        answers = []
        for at in shards:
            SHARDS["at"] = at
            answers.append(model(ids[:, at], position_ids=positions[at][None], use_cache=False).logits)
    model.set_attn_implementation("sdpa")
    return torch.cat(answers, 1), torch.cat(list(shards))


LAYOUTS = {
    "contiguous": lambda at: at.split(8),
    "zigzag": lambda at: [torch.cat([at[i * 4 : i * 4 + 4], at[28 - i * 4 : 32 - i * 4]]) for i in range(4)],
    "striped": lambda at: [at[i::4] for i in range(4)],
}


@pytest.mark.parametrize(
    ("layout", "packed"), [("contiguous", False), ("contiguous", True), ("zigzag", False), ("striped", False)]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_split_sequence_takes_the_global_n(layout, packed, family):
    changes = {"mistral": {"sliding_window": 6}, "gpt2": {}, "llama": {}}[family]
    model = tiny_model(family, **changes)
    ssmax.convert(model, 0.5, layers=[0, 1])
    ids = torch.randint(3, 96, (1, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(13), torch.arange(19)]) if packed else torch.arange(32)
    with torch.no_grad():
        want = model(ids, position_ids=positions[None], use_cache=False).logits
        got, order = sharded_logits(model, ids, positions, LAYOUTS[layout](torch.arange(32)))
    torch.testing.assert_close(got, want[:, order], rtol=0, atol=2e-4)


def test_a_split_sequence_whose_n_is_open_is_refused():
    model = ssmax.convert(tiny_model("llama"), 0.5)
    model.set_attn_implementation("over_shards")
    SHARDS.update(at=torch.arange(8), document=torch.zeros(64))
    ids, positions = torch.full((1, 8), 5), torch.arange(8, 16)[None]
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="leave attention_mask out"):
        model(ids, attention_mask=padding, position_ids=positions, use_cache=False)
    model(ids, attention_mask=padding, use_cache=False)  # positions within the keys say nothing of other ranks
    module = model.model.layers[0].self_attn
    query = torch.zeros(1, 4, 8, 8)
    arguments = ("over_shards", module, query, query, None)
    with pytest.raises(ValueError, match="without causal attention"):
        kernel_visible_keys(*arguments, {"position_ids": positions, "is_causal": False}, closed=False)
    with pytest.raises(ValueError, match="needs the global position_ids"):
        kernel_visible_keys(*arguments, {"cu_seq_lens_q": torch.tensor([0, 16])}, closed=False)


def test_plain_kernels_count_what_they_are_handed(monkeypatch):
    """Positions that users shift do not matter to sdpa; a kernel from elsewhere is another matter."""
    model = ssmax.convert(tiny_model("gpt2"), 0.5)
    plain = copy.deepcopy(model)
    ids = torch.randint(3, 96, (1, 8))
    for layer in (model.transformer.wpe, plain.transformer.wpe):
        torch.nn.init.zeros_(layer.weight)
    with torch.no_grad():
        got = model(ids, position_ids=torch.arange(8, 16)[None], use_cache=False).logits
        torch.testing.assert_close(got, plain(ids, use_cache=False).logits)
    own = AttentionInterface().get("sdpa")
    assert sees_what_it_is_handed(own)
    assert sees_what_it_is_handed(flash_attention_forward)
    assert not sees_what_it_is_handed(over_shards)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: None)
    assert not sees_what_it_is_handed(own)
