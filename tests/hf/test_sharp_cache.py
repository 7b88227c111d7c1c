"""A converted model's generate through SharpCache: the same tokens, each attention within its bound."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import ssmax
from ssmax.hf import SharpCache, sharp_cache
from ssmax.sharp import decode as sharp_decode

pytestmark = pytest.mark.usefixtures("exact_int8")
LENGTH = 4300


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, num_key_value_heads=2, max_position_embeddings=8192, **shape)
    config._attn_implementation = "sdpa"
    model = ssmax.convert(LlamaForCausalLM(config).eval(), 3.0)
    for layer in model.model.layers:  # a random model attends flatly
        layer.self_attn.q_proj.weight.data *= 40
        layer.self_attn.k_proj.weight.data *= 10
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def kept(monkeypatch):
    counts = []
    original = sharp_decode._attend

    def watched(rows, key, value, seen, found):
        counts.extend(len(keys) for keys in found.values())
        return original(rows, key, value, seen, found)

    monkeypatch.setattr(sharp_decode, "_attend", watched)
    return counts


def generated(model, tokens, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(tokens, **options)


def test_greedy_tokens_are_those_of_the_plain_cache(model, tokens, kept):
    for options in ({}, {"attention_mask": (torch.arange(LENGTH) >= torch.tensor([[0], [77]])).long()}):
        want = generated(model, tokens, **options)
        assert not kept
        got = generated(model, tokens, past_key_values=SharpCache(model), **options)
        assert torch.equal(got, want)
        assert len(kept) > 20
        assert sum(kept) / len(kept) < LENGTH / 10
        kept.clear()


def test_cropping_as_in_prompt_lookup(model, tokens, kept):
    one = tokens[:1].clone()
    one[:, LENGTH // 2 :] = one[:, : LENGTH // 2]  # something to look up
    want = generated(model, one)
    got = generated(model, one, past_key_values=SharpCache(model), prompt_lookup_num_tokens=3)
    assert torch.equal(got, want)
    assert kept


def test_attention_is_within_its_bound_and_a_small_tolerance_gives_the_same_logits(model, tokens, kept):
    inputs = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    found = {}
    for name, cache in (
        ("plain", DynamicCache(config=model.config)),
        ("sharp", SharpCache(model, 1e-2)),
        ("close", SharpCache(model, 1e-9)),
    ):
        with torch.no_grad():
            model(tokens[:, :-1], past_key_values=cache)
            inputs.clear()
            logits = model(tokens[:, -1:], past_key_values=cache).logits
        found[name] = inputs[0], logits
        largest = cache.layers[0].values.abs().max()
    assert kept
    error = (found["sharp"][0] - found["plain"][0]).abs().max()
    assert 0 < error <= 2 * 1e-2 * largest
    assert (found["close"][1] - found["plain"][1]).abs().max() < 1e-4 * found["plain"][1].abs().max()


def test_the_cache_grows_in_place_and_crops(model, tokens):
    cache, plain = SharpCache(model), DynamicCache(config=model.config)
    with torch.no_grad():
        for part in tokens[:, :300].split(100, 1):
            ours, theirs = (model(part, past_key_values=c).logits for c in (cache, plain))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        place = cache.layers[0].keys.data_ptr()
        model(tokens[:, 300:301], past_key_values=cache)
        assert cache.layers[0].keys.data_ptr() == place
        cache.crop(-51)
        plain.crop(-50)
        assert cache.get_seq_length() == plain.get_seq_length() == 250
        assert torch.equal(cache.layers[1].values, plain.layers[1].values)
    cache.reset()
    assert cache.get_seq_length() == 0


def decode(model, cache, tokens, steps):
    """Logits of so many steps, each of the same token."""
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        return torch.cat([model(tokens[:, :1], past_key_values=cache).logits for _ in range(steps)], 1)


def test_layers_that_gain_nothing_turn_plain_and_say_so_once(model, tokens, kept, monkeypatch):
    monkeypatch.setattr(sharp_cache, "TRIAL", 6)
    mixed = copy.deepcopy(model)
    mixed.model.layers[1].self_attn.q_proj.weight.data *= 0  # flat, whatever the keys are
    want = decode(mixed, DynamicCache(config=mixed.config), tokens, 12)
    cache = SharpCache(mixed)
    with pytest.warns(UserWarning, match=r"1 of 2 layers are sharp \(0\)") as said:
        got = decode(mixed, cache, tokens, 12)
    assert len(said) == 1
    torch.testing.assert_close(got, want, rtol=0, atol=5e-3 * want.abs().max().item())
    assert [layer.sharp for layer in cache.layers] == [True, False]
    assert cache.layers[1].screened._codes is None  # its memory is given back
    assert cache.layers[1].screened.steps == 6  # from then on it is not asked
    assert cache.layers[0].screened.steps == 12
    shares = cache.share_read()
    assert shares[1].tolist() == [[1, 1], [1, 1]]
    assert shares[0].shape == (2, 2)
    assert shares[0].max() < 0.1
    assert sum(kept) / len(kept) / LENGTH == pytest.approx(shares[0].mean(), rel=1e-2)
    cache.reset()
    decode(mixed, cache, tokens[:, :20], 1)
    assert [layer.sharp for layer in cache.layers] == [None, None]


def test_a_sharp_model_says_nothing(model, tokens, monkeypatch, recwarn):
    monkeypatch.setattr(sharp_cache, "TRIAL", 3)
    cache = SharpCache(model)
    decode(model, cache, tokens, 5)
    assert [layer.sharp for layer in cache.layers] == [True, True]
    assert not [w for w in recwarn if "layers are sharp" in str(w.message)]


def test_refusals(model, tokens):
    with pytest.raises(ValueError, match="cannot reorder"):
        generated(model, tokens[:, :20], past_key_values=SharpCache(model), num_beams=2)
    with pytest.raises(ValueError, match="tolerance must be a number between 0 and 1"):
        SharpCache(model, tolerance=2)
    with pytest.raises(ValueError, match="needs a converted model, got LlamaForCausalLM"):
        SharpCache(
            LlamaForCausalLM(LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=9))
        )
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="'sdpa', got 'eager'"):
        SharpCache(model)
    model.set_attn_implementation("sdpa")


def test_a_layer_that_turned_plain_equals_an_ordinary_cache(model, tokens):
    caches = [SharpCache(model), DynamicCache(config=model.config)]
    mask = torch.ones(2, LENGTH + 1, dtype=torch.long)
    mask[1, :9] = 0  # left padding
    with torch.no_grad():
        for cache in caches:
            model(tokens, attention_mask=mask[:, :-1], past_key_values=cache)
        for layer in caches[0].layers:
            layer.sharp = False
            layer.screened.give_up()
        with pytest.warns(UserWarning, match="0 of 2 layers are sharp"):
            got, want = (model(tokens[:, :1], attention_mask=mask, past_key_values=cache).logits for cache in caches)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
