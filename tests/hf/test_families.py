"""Many families against a naive float64 core that knows who sees whom from the test, not from any mask."""

import copy
import functools

import numpy as np
import oracle
import pytest
import rounding
import torch
from tiny_models import implementations, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import ssmax

PLAIN = [
    "apertus",
    "arcee",
    "aria_text",
    "bitnet",
    "cohere",
    "cwm",
    "ernie4_5",
    "ernie4_5_moe",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "jais2",
    "jetmoe",
    "llama",
    "minimax_m2",
    "mixtral",
    "modernbert-decoder",
    "nanochat",
    "nemotron",
    "olmo",
    "olmo2",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "vaultgemma",
]
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_value_head_dim": 8, "linear_key_head_dim": 8}
# Family -> what its config needs beyond the sizes of tiny_models.
FAMILIES: dict[str, dict] = {
    **{family: {} for family in PLAIN},
    # a full layer behind windowed ones
    "cohere2": {"num_hidden_layers": 4},
    "exaone4": {"num_hidden_layers": 4},
    "gemma3_text": {"num_hidden_layers": 6},
    "llama4_text": {"num_hidden_layers": 4, "attn_temperature_tuning": False},
    "mistral": {"sliding_window": None},
    "olmo3": {"num_hidden_layers": 4},
    # latent attention: keys wider than values
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "minicpm3": {"num_key_value_heads": 4},
    # recurrent layers beside the attention, or recurrent parts inside its layer
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "jamba": {"num_hidden_layers": 2, "attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {},
    "qwen3_5_text": {"num_hidden_layers": 4, **DELTA},
    "qwen3_next": {"num_hidden_layers": 4, **DELTA},
}

TOKENS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(3))
LEFT = np.array([[0] * 5 + [1] * 7, [1] * 12])
RIGHT = LEFT[:, ::-1].copy()
PACKED = [5, 7]
LAYOUTS = {
    "causal": ({"input_ids": TOKENS}, np.ones((2, 12), dtype=int), oracle.causal(12, 12)),
    "left": ({"input_ids": TOKENS, "attention_mask": torch.tensor(LEFT)}, LEFT, oracle.causal(12, 12)),
    "right": ({"input_ids": TOKENS, "attention_mask": torch.tensor(RIGHT)}, RIGHT, oracle.causal(12, 12)),
    "packed": (
        {"input_ids": TOKENS[:1], "position_ids": torch.tensor([[*range(5), *range(7)]])},
        np.ones((1, 12), dtype=int),
        oracle.documents(PACKED),
    ),
}
NOW: dict = {}


def naive(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **kwargs):
    """softmax((s log n + b) softcap(z)) v in float64; NOW["open"] (B, N, S) says who sees whom."""
    open_keys = NOW["open"]
    if kwargs.get("sliding_window") is not None:
        gap = torch.arange(open_keys.shape[1])[:, None] - torch.arange(open_keys.shape[2])
        open_keys = open_keys & (gap < kwargs["sliding_window"])
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(groups, 1), value.double().repeat_interleave(groups, 1)
    z = q @ k.mT * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if hasattr(module, "naive"):
        s, b = module.naive
        z = (
            z
            * (s.double()[:, None] * open_keys.sum(-1).clamp(min=1).double().log()[:, None] + b.double()[:, None])[
                ..., None
            ]
        )
    z = z.masked_fill(~open_keys[:, None], -1e300)
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    if sinks is not None:
        z = torch.cat([z, sinks.double().reshape(1, -1, 1, 1).expand(*z.shape[:3], 1)], -1)
    weights = z.softmax(-1)[..., : open_keys.shape[-1]]
    return (weights @ v).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register("naive", naive)
AttentionMaskInterface.register("naive", lambda **arguments: None)


def converted_and_naive(family, **changes):
    """The converted model with its own s and b in every head, and the plain one whose core computes the same naively."""
    plain = tiny_model(family, **{**FAMILIES[family], **changes})
    model = ssmax.convert(copy.deepcopy(plain), 0.5, bias=True)
    generator = torch.Generator().manual_seed(7)
    modules = dict(plain.named_modules())
    for name, module in model.named_modules():
        if hasattr(module, "ssmax"):
            with torch.no_grad():
                for parameter in (module.ssmax.s, module.ssmax.b):
                    parameter.copy_(0.2 + 0.6 * torch.rand(parameter.shape, generator=generator))
            modules[name].naive = module.ssmax.s, module.ssmax.b
    plain.set_attn_implementation("naive")
    return model, plain


def naive_logits(plain, layout, leaking=False):
    inputs, real, table = LAYOUTS[layout]
    table = oracle.causal(12, 12) if leaking else table
    NOW["open"] = torch.tensor(table[None] & real.astype(bool)[:, None, :])
    with torch.no_grad():
        return plain(**inputs, use_cache=False).logits


def leaks(family, plain, implementation):
    """Whether transformers' own softmax model lets packed documents see each other; n must follow what is seen."""
    softmax = tiny_model(family, **FAMILIES[family])
    softmax.set_attn_implementation(implementation)
    with torch.no_grad():
        got = softmax(**LAYOUTS["packed"][0], use_cache=False).logits
    for module in (bare := copy.deepcopy(plain)).modules():
        if hasattr(module, "naive"):
            del module.naive
    apart, together = (naive_logits(bare, "packed", leaking) for leaking in (False, True))
    errors = [(got - want).abs().max() for want in (apart, together)]
    assert min(errors) < max(errors) / 100  # it is one of them
    return bool(errors[1] < errors[0])


@functools.cache
def bound(family):
    """What rounding may do to a converted family's logits; rows that see fewer tokens than of LAYOUTS["causal"] have fewer terms."""
    model, _ = converted_and_naive(family)
    with torch.no_grad():
        return rounding.of(lambda: model(TOKENS, use_cache=False).logits, draws=4).max().item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_the_naive_core(family):
    model, plain = converted_and_naive(family)
    checked = 0
    for layout, (inputs, real, _) in LAYOUTS.items():
        for implementation in implementations(model):
            want = naive_logits(plain, layout, layout == "packed" and leaks(family, plain, implementation))
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                got = model(**inputs, use_cache=False).logits
            close(got, want, real, family)
            checked += 1
        if layout == "causal":
            with torch.no_grad():
                ssmax_off = ssmax.revert(copy.deepcopy(model))(**inputs, use_cache=False).logits
            assert (ssmax_off - want).abs().max() > 1e-3, "the comparison would not notice SSMax"
    assert checked in (4, 12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_flex_attention_equals_the_naive_core(family):
    """Whole passes, forward only: torch's kernel for CPUs has no backward, and does not compile for a growing cache."""
    model, plain = converted_and_naive(family)
    model.set_attn_implementation("flex_attention")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # torch has no such kernel for these processors
        with pytest.raises(Exception, match="not supported for CPU"), torch.no_grad():
            model(**LAYOUTS["causal"][0], use_cache=False)
        return
    for layout, (inputs, real, _) in LAYOUTS.items():
        want = naive_logits(plain, layout)
        with torch.no_grad():
            close(model(**inputs, use_cache=False).logits, want, real, family)


def close(got, want, real, family):
    """Both were rounded, at different places."""
    where = torch.tensor(real, dtype=torch.bool)
    rounding.assert_within(got[where], want[where], 2 * bound(family), family)


# Tokens of each forward: a prompt and single steps; a prompt in chunks.
PASSES = {"decode": [8, 1, 1, 1, 1], "chunked prefill": [5, 4, 3]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_pass_equals_the_naive_core(family):
    model, plain = converted_and_naive(family)
    recurrent = any("linear_attention" in str(kind) or kind in ("conv", "hybrid") for kind in kinds(model))
    checked = 0
    for layout in ("causal", "left"):
        inputs, real, _ = LAYOUTS[layout]
        want = naive_logits(plain, layout)
        for implementation in (name for name in implementations(model) if name != "standin_of_fa2"):
            model.set_attn_implementation(implementation)
            for cache in ("dynamic", "static"):
                if cache == "static" and recurrent:
                    continue  # transformers has no static cache for these
                for name, pieces in PASSES.items():
                    if recurrent and name != "decode":
                        continue
                    got = cached_logits(model, inputs, pieces, cache)
                    close(got, want, real, family)
                    checked += 1
    assert checked >= 2


def kinds(model):
    return getattr(model.config.get_text_config(), "layer_types", None) or []


def cached_logits(model, inputs, pieces, cache):
    config = model.config.get_text_config()
    kept = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=16)
    mask = inputs.get("attention_mask", torch.ones_like(TOKENS))
    parts, start = [], 0
    for count in pieces:
        stop = start + count
        with torch.no_grad():
            output = model(
                input_ids=TOKENS[:, start:stop],
                attention_mask=mask[:, :stop],
                past_key_values=kept,
                use_cache=True,
            )
        parts.append(output.logits)
        start = stop
    return torch.cat(parts, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox", "gemma2", "olmoe", "cohere", "phi3", "gpt2"])
def test_round_trips_are_exact(family, tmp_path):
    model, _ = converted_and_naive(family)
    with torch.no_grad():
        want = model(TOKENS).logits
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(loaded) is type(model)
        assert torch.equal(loaded(TOKENS).logits, want)
        plain = tiny_model(family, **FAMILIES[family])
        assert torch.equal(ssmax.revert(loaded)(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_generates_what_each_row_generates_alone(family):
    model, _ = converted_and_naive(family)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = TOKENS.masked_fill(torch.tensor(LEFT) == 0, 0)
    together = model.generate(batch, attention_mask=torch.tensor(LEFT), **options)[:, 12:]
    for row, prompt in enumerate((batch[:1, 5:], batch[1:])):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        assert together[row].tolist() == alone.tolist()


@pytest.mark.filterwarnings("ignore")
def test_windowed_layers_stay_unless_named():
    changes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    model, plain = converted_and_naive("qwen2", use_sliding_window=True, **changes)
    assert model.config.ssmax["layers"] == [1]
    for implementation in implementations(model):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            close(model(TOKENS).logits, naive_logits(plain, "causal"), np.ones((2, 12)), "qwen2")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "standin_of_fa2"])
def test_a_window_named_by_index_counts_what_it_sees(implementation):
    plain = tiny_model("mistral", sliding_window=4)
    with pytest.raises(ValueError, match="no layer attends in full"):
        ssmax.convert(plain)
    model = ssmax.convert(plain, 0.5, layers=[0, 1])
    model.set_attn_implementation(implementation)
    seen = []
    hook = model.model.layers[0].self_attn.ssmax.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[1])
    )
    with torch.no_grad():
        model(**LAYOUTS["left"][0])
    hook.remove()
    want = (oracle.causal(12, 12, 4)[None] & LEFT.astype(bool)[:, None]).sum(-1)
    real = LEFT.astype(bool)
    assert (seen[0].expand(2, 12).numpy()[real] == want[real]).all()


@pytest.mark.filterwarnings("ignore")
def test_each_mask_is_counted_once_a_forward(monkeypatch):
    from ssmax.hf import visibility

    model, _ = converted_and_naive("llama")
    calls = []
    monkeypatch.setattr(visibility, "visible_keys", lambda **a: calls.append(1) or ssmax.visible_keys(**a))
    for _ in range(2):
        model(**LAYOUTS["left"][0])
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=9)),
            r"its attention \(BloomAttention\) does not pass through transformers' attention interface",
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=9)
            ),
            "adds a bias to its logits",
        ),
        (lambda: tiny_model("falcon"), "attention interface"),
        (lambda: tiny_model("llama4_text"), "temperature tuning"),
        (lambda: tiny_model("ministral3"), "llama_4_scaling_beta"),
        (lambda: tiny_model("mamba"), "it has no attention"),
    ],
)
def test_what_cannot_be_converted_says_why_and_stays_as_it_was(build, words):
    model = build()
    kind, names = type(model), list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        ssmax.convert(model)
    assert type(model) is kind
    assert list(model.state_dict()) == names
