import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import rounding
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from written_out import FAMILIES, SHAPE, TOKENS, logits_bound, naive_llama, spread_scales

import ssmax

# Of a query times s log n + b: the logarithm (1 ulp, u 2), its products and sums (4 more) and the last product, doubled.
SCALED = rounding.gamma(16, rounding.unit(torch.float32))


@pytest.fixture(params=sorted(FAMILIES))
def model(request):
    config_type, model_type = FAMILIES[request.param]
    torch.manual_seed(0)
    return model_type(config_type(**SHAPE)).eval()


def recorded_attention(model, **inputs):
    """Run the model; return for each layer what its kernel got before scaling, and what came out."""
    calls = []
    hooks = []

    def record(module, arguments, keywords, output):
        calls.append((arguments[0].detach(), output.detach()))

    for layer in model.model.layers:
        hooks.append(layer.self_attn.ssmax.register_forward_hook(record, with_kwargs=True))
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits, calls


def expected_n(mask, implementation_rows):
    """Real tokens up to and including each one."""
    return np.cumsum(mask, 1)[:, -implementation_rows:]


MASKS = {
    "none": None,
    "left": np.array([[0] * 5 + [1] * 7, [1] * 12]),
    "right": np.array([[1] * 7 + [0] * 5, [1] * 12]),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", MASKS)
def test_each_query_is_scaled_by_its_own_n(model, implementation, padding):
    spread_scales(ssmax.convert(model, 0.5, bias=True))
    model.set_attn_implementation(implementation)
    mask = MASKS[padding]
    inputs = {} if mask is None else {"attention_mask": torch.tensor(mask)}
    _, calls = recorded_attention(model, input_ids=TOKENS, **inputs)
    n = expected_n(np.ones((2, 12), dtype=int) if mask is None else mask, 12)
    real = n > 0 if padding == "left" else np.ones_like(n, dtype=bool)
    for layer, (query, scaled) in zip(model.model.layers, calls, strict=True):
        s, b = (p.detach().numpy() for p in (layer.self_attn.ssmax.s, layer.self_attn.ssmax.b))
        m = s[None, :, None] * np.log(np.maximum(n, 1))[:, None] + b[None, :, None]
        want, where = query.numpy() * m[..., None], np.broadcast_to(real[:, None, :], m.shape)
        terms = (
            query.numpy()
            * (np.abs(s)[None, :, None] * np.log(np.maximum(n, 1))[:, None] + np.abs(b)[None, :, None])[..., None]
        )
        rounding.assert_within(scaled.numpy()[where], want[where], SCALED * np.abs(terms)[where])
        assert abs(want).max() > 0.1


def test_logits_equal_a_llama_written_out_in_float64():
    torch.manual_seed(0)
    model = spread_scales(ssmax.convert(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval(), 0.5, bias=True))
    with torch.no_grad():
        got = model(TOKENS).logits.numpy()
    want = naive_llama(model, TOKENS)
    assert abs(want).max() > 1
    rounding.assert_within(got, want, logits_bound(model))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "chunks"])
def test_caches_equal_one_pass(model, implementation, cache):
    spread_scales(ssmax.convert(model, 0.5, bias=True))
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        whole = model(TOKENS).logits
        store = (
            StaticCache(config=model.config, max_cache_len=40)
            if cache == "static"
            else DynamicCache(config=model.config)
        )
        pieces = [5, 4, 3] if cache == "chunks" else [6, 1, 1, 1, 1, 1, 1]
        parts, at = [], 0
        for piece in TOKENS.split(pieces, 1):
            at += piece.shape[1]
            parts.append(model(piece, past_key_values=store).logits)
        rounding.assert_within(torch.cat(parts, 1), whole, 2 * logits_bound(model))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_left_padded_batch_generates_what_each_row_generates_alone(model, implementation):
    spread_scales(ssmax.convert(model, 0.5, bias=True))
    model.set_attn_implementation(implementation)
    rows = [TOKENS[:1, :5], TOKENS[1:, :9]]
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = [model.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :] for row in rows]
    batch = torch.zeros(2, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, 9 - row.shape[1] :] = row[0]
    together = model.generate(batch, attention_mask=(batch != 0).long(), **options)[:, 9:]
    assert torch.equal(torch.stack(alone), together)


def test_identity_is_the_same_model_and_learns(model):
    before = model(TOKENS).logits
    ssmax.convert(model, "identity")
    rounding.assert_within(model(TOKENS).logits, before, 2 * logits_bound(model))
    model(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model.named_parameters():
        if ".ssmax." in name:
            assert parameter.grad.abs().max() > 0


def test_matched_takes_the_configs_length_or_the_one_given(model):
    ssmax.convert(model)
    assert model.model.layers[1].self_attn.ssmax.s.tolist() == pytest.approx([ssmax.matched_scale(64)] * 4)
    assert model.model.layers[1].self_attn.ssmax.b is None
    ssmax.convert(ssmax.revert(model), train_length=1024, bias=True)
    assert model.model.layers[0].self_attn.ssmax.s.tolist() == pytest.approx([0.16847] * 4, abs=5e-6)
    assert model.model.layers[0].self_attn.ssmax.b.tolist() == [0.0] * 4


def test_some_layers_only(model):
    ssmax.convert(model, layers=[1])
    assert [hasattr(layer.self_attn, "ssmax") for layer in model.model.layers] == [False, True]
    assert model.config.ssmax["layers"] == [1]


def test_revert_is_bit_for_bit(model):
    before = copy.deepcopy(model)
    ssmax.revert(ssmax.convert(model))
    assert type(model) is type(before)
    assert type(model.config) is type(before.config)
    assert model.config.to_dict() == before.config.to_dict()
    assert model.__dict__.keys() == before.__dict__.keys()
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(
        torch.equal(x, y) for x, y in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    with ssmax.converted(model, 0.5):
        assert "ssmax.weight" in "".join(model.state_dict())
    assert model.config.to_dict() == before.config.to_dict()


def test_other_models_are_untouched(model):
    other = copy.deepcopy(model)
    before = other(TOKENS).logits
    ssmax.convert(model, 0.9)
    assert torch.equal(other(TOKENS).logits, before)


@pytest.mark.parametrize("size", ["10GB", "10KB"])
def test_saved_and_loaded_is_the_same_model(model, tmp_path, size):
    spread_scales(ssmax.convert(model, 0.5, bias=True, layers=[1]))
    want = model(TOKENS).logits
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("ssmax_")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(TOKENS).logits, want)
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(TOKENS).logits, want)
    assert torch.equal(copy.deepcopy(loaded)(TOKENS).logits, want)
    reverted = ssmax.revert(loaded)
    assert type(reverted) in [family for _, family in FAMILIES.values()]
    assert not hasattr(reverted.config, "auto_map")


def test_bfloat16_keeps_s_in_float32(model, tmp_path):
    spread_scales(ssmax.convert(model, 0.5)).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for mine, theirs in zip(model.model.layers, loaded.model.layers, strict=True):
        assert torch.equal(mine.self_attn.ssmax.s, theirs.self_attn.ssmax.s)


LOAD = "import warnings; from transformers import AutoModelForCausalLM as A; {before}; print(type(A.from_pretrained({path!r}{options})).__name__)"


@pytest.mark.parametrize(
    ("before", "options", "works"),
    [("import ssmax.hf", "", True), ("pass", ", trust_remote_code=True", True), ("pass", "", False)],
)
def test_a_fresh_process_loads_it_or_fails_loudly(model, tmp_path, before, options, works):
    ssmax.convert(model).save_pretrained(tmp_path / "model")
    code = LOAD.format(before=before, path=str(tmp_path / "model"), options=options)
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
    )
    assert (done.returncode == 0) == works, done.stderr
    assert ("SSMax" in done.stdout) == works


def test_a_plain_class_refuses_a_converted_checkpoint(model, tmp_path):
    plain = type(model)
    ssmax.convert(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{plain.config_class.__name__} would drop its scales"):
        plain.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would drop its scales"):
        plain.config_class.from_pretrained(tmp_path)
    assert type(type(model).from_pretrained(tmp_path)) is type(model)


def damage(folder, change):
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {k: v for k, v in t.items() if ".1.self_attn.ssmax" not in k},
        lambda t: t | {"model.layers.0.self_attn.ssmax.bias": torch.ones(4)},
        lambda t: t | {"model.layers.0.self_attn.ssmax.weight": torch.ones(3)},
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_a_checkpoint_that_lost_its_scale_is_refused(model, tmp_path, change):
    ssmax.convert(model).save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises((ValueError, RuntimeError), match=r"ssmax|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("ssmax"), "config.ssmax is missing"),
        (lambda c: c.update(ssmax="matched"), "config.ssmax must hold"),
        (lambda c: c["ssmax"].pop("layers"), "config.ssmax must hold"),
        (lambda c: c["ssmax"].update(layers=[0, 7]), r"names layers \[7\]"),
        (lambda c: c.update(model_type="llama"), "would drop its scales"),
    ],
    ids=["missing", "no recipe", "no layers", "other layers", "renamed to softmax"],
)
def test_a_config_with_a_damaged_recipe_is_refused(model, tmp_path, change, words):
    ssmax.convert(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": "paper"}, "init must be"),
        ({"init": True}, "init must be"),
        ({"init": "identity", "bias": False}, "contradicts"),
        ({"layers": [2]}, r"layers must be some of \[0, 1\]"),
        ({"layers": []}, r"layers must be some of \[0, 1\]"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(model, options, words):
    before = type(model), model.config.to_dict()
    with pytest.raises(ValueError, match=words):
        ssmax.convert(model, **options)
    assert (type(model), model.config.to_dict()) == before
    assert not any(".ssmax." in name for name in model.state_dict())


def test_wrong_models_are_refused(model):
    with pytest.raises(ValueError, match="converted already"):
        ssmax.convert(ssmax.convert(model))
    with pytest.raises(ValueError, match="not a converted model"):
        ssmax.revert(ssmax.revert(model))
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, got dict"):
        ssmax.hf.convert({})
    with pytest.raises(ValueError, match="no causal self-attention of bloom"):
        ssmax.convert(BloomModel(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=9)))


def test_an_unknown_attention_implementation_is_refused(model):
    AttentionInterface.register("odd", ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register("odd", lambda **arguments: None)
    ssmax.convert(model)
    model.set_attn_implementation("odd")
    with pytest.raises(ValueError, match="'odd' mean; use 'sdpa' or 'eager'"):
        model(TOKENS)


def test_training_moves_s_and_the_norms_of_s_are_not_decayed(model):
    ssmax.convert(model)
    model.train()
    before = model.model.layers[0].self_attn.ssmax.s.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert (model.model.layers[0].self_attn.ssmax.s - before).abs().max() > 0.01


def test_fold_is_the_same_llama_and_refuses_where_it_would_not_be(tmp_path):
    torch.manual_seed(0)
    model = spread_scales(ssmax.convert(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval(), 0.5))
    want, bound = model(TOKENS).logits, 2 * logits_bound(model)
    ssmax.fold(model)
    rounding.assert_within(model(TOKENS).logits, want, bound)
    assert all(layer.self_attn.ssmax.s.eq(1).all() for layer in model.model.layers)
    model.save_pretrained(tmp_path)
    rounding.assert_within(AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, want, bound)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [("llama", {"init": "identity"}, "bias b"), ("qwen3", {}, "q_norm lies between"), ("llama", None, "no s to fold")],
)
def test_fold_refuses_what_it_cannot_do_exactly(family, options, words):
    config_type, model_type = FAMILIES[family]
    model = model_type(config_type(**SHAPE))
    if options is not None:
        ssmax.convert(model, **options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        ssmax.fold(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


N_OF_LEFT_PADDED = np.cumsum(MASKS["left"], 1)
FORMULAS = {
    "ssmax-fixed": ({}, lambda n: np.log(n)),
    "qwen-1": ({"train_length": 6}, lambda n: np.maximum(1, np.log(n) / np.log(6))),
    "yarn": ({"factor": 8.0}, lambda n: np.full(n.shape, (0.1 * np.log(8) + 1) ** 2)),
    "llama-4": ({"floor": 3}, lambda n: 1 + 0.1 * np.log(n // 3 + 1)),
    "ministral-3": ({"length": 4}, lambda n: 1 + 0.1 * np.log(1 + (n - 1) // 4)),
}


@pytest.mark.parametrize("law", FORMULAS)
def test_laws_that_learn_nothing(model, law, tmp_path):
    parameters, formula = FORMULAS[law]
    plain = model.state_dict().keys()
    ssmax.convert(model, law=law, law_parameters=parameters)
    assert model.state_dict().keys() == plain
    mask = torch.tensor(MASKS["left"])
    logits, calls = recorded_attention(model, input_ids=TOKENS, attention_mask=mask)
    real = N_OF_LEFT_PADDED > 0
    for query, scaled in calls:
        want = query.numpy() * formula(np.maximum(N_OF_LEFT_PADDED, 1))[:, None, :, None]
        scaled, want = scaled.numpy().swapaxes(1, 2)[real], want.swapaxes(1, 2)[real]
        rounding.assert_within(scaled, want, SCALED * np.abs(want))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.ssmax["law"] == law
    assert torch.equal(loaded(TOKENS, attention_mask=mask).logits, logits)
    with pytest.raises(ValueError, match=f"it has law {law}, and fold takes s log n alone"):
        ssmax.fold(model)
    with pytest.raises(ValueError, match="learns nothing"):
        ssmax.calibrate(model, TOKENS.repeat(1, 8), length=16)
    assert isinstance(ssmax.revert(model), FAMILIES[model.config.model_type][1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"law": "olmo"}, "law must be ssmax, ssmax-fixed"),
        ({"law": "yarn"}, "factor is missing"),
        ({"law": "yarn", "law_parameters": {"factor": 2, "length": 3}}, "does not take length"),
        ({"law": "qwen-1", "init": "identity"}, "learns nothing"),
        ({"law": "qwen-1", "bias": True}, "learns nothing"),
        ({"law_parameters": {"factor": 2}}, "not law_parameters"),
    ],
)
def test_laws_that_do_not_fit_leave_the_model_as_it_was(model, options, words):
    before = type(model)
    with pytest.raises(ValueError, match=words):
        ssmax.convert(model, **options)
    assert type(model) is before
    assert not any(hasattr(layer.self_attn, "ssmax") for layer in model.model.layers)


def test_a_law_of_the_training_length_takes_the_configs(model):
    ssmax.convert(model, law="qwen-1")
    assert model.config.ssmax["parameters"] == {"train_length": 64}


def test_a_law_of_the_position_stays_out_of_windows():
    changes = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "use_sliding_window": True}
    windowed = tiny_model("qwen2", num_hidden_layers=2, **changes)
    with pytest.raises(ValueError, match="which layers with a window"):
        ssmax.convert(windowed, law="llama-4", layers=[0, 1])
    assert ssmax.convert(windowed, law="llama-4").config.ssmax["layers"] == [1]
