"""Encoders, encoder-decoders and vision models of transformers against a naive float64 core that knows who sees whom."""

import copy
import pickle
import re

import pytest
import torch
from peft import AdaptionPromptConfig, get_peft_model
from tiny_models import tiny_config
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

import ssmax

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = [
    *("albert", "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "esm", "eurobert"),
    *(
        "jina_embeddings_v3",
        "modernbert",
        "nomic_bert",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
    ),
]
VISION = [
    *(
        "clip_vision_model",
        "deit",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "ijepa",
        "siglip_vision_model",
        "vit",
    ),
    "vit_msn",
]
TRANSLATION = [
    *("bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "pegasus", "plbart"),
]
SIZES = {
    **dict.fromkeys(("encoder_layers", "decoder_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 40),
    **dict.fromkeys(("dim", "embedding_size"), 32),
    **{"image_size": 16, "patch_size": 8, "decoder_start_token_id": 2, "dropout": 0.0, "num_mel_bins": 8},
    **{"max_source_positions": 10, "global_attn_every_n_layers": 1},
}
TOKENS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(3))
TARGET = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(4))
REAL = torch.ones(2, 9, dtype=torch.bool)
REAL[0, 6:] = False
NOW: dict = {}


def naive(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """softmax((s log n + b) z) v; NOW[part] (B, N, S) says who sees whom in the module's part of the model."""
    visible = NOW[module.naive_part].expand(query.shape[0], query.shape[2], key.shape[2])[:, None]
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    z = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if hasattr(module, "naive_scale"):
        s, b = module.naive_scale
        z = z * (s[:, None, None] * visible.sum(-1, keepdim=True).clamp(min=1).double().log() + b[:, None, None])
    return (z.masked_fill(~visible, -1e300).softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("naive_parts", naive)
AttentionMaskInterface.register("naive_parts", lambda **arguments: None)


def made(family, **changes):
    torch.manual_seed(0)
    names = CONFIG_MAPPING[family]().to_dict()
    config = tiny_config(family, **{name: value for name, value in SIZES.items() if name in names} | changes)
    return AutoModel.from_config(config).double().eval()


def converted_and_naive(plain, **options):
    """The converted model with its own s and b in every head, and a plain one whose core computes the same naively."""
    model = ssmax.convert(copy.deepcopy(plain), 0.5, bias=True, **options)
    generator, plain = torch.Generator().manual_seed(7), copy.deepcopy(plain)
    plain.set_attn_implementation("naive_parts")
    twins = dict(plain.named_modules())
    for name, module in model.named_modules():
        twin = twins.get(name)
        if twin is not None and "Attention" in type(twin).__name__:
            cross = re.search("cross|encoder_attn", name) is not None
            twin.naive_part = "cross" if cross else "decoder" if name.startswith("decoder") else "encoder"
        if module._modules.get("ssmax") is not None:
            with torch.no_grad():
                for parameter in (module.ssmax.s, module.ssmax.b):
                    parameter.copy_(0.2 + 0.6 * torch.rand(parameter.shape, generator=generator))
            twin.naive_scale = module.ssmax.s.detach().double(), module.ssmax.b.detach().double()
    return model, plain


def same(got, want, implementation, real=slice(None)):
    """transformers' eager attention takes its softmax in float32."""
    error, size = (got - want)[real].abs().max().item(), max(1, want[real].abs().max().item())
    assert error < {"sdpa": 1e-9, "eager": 1e-5}[implementation] * size


def scaled(model):
    return [name for name, module in model.named_modules() if name.endswith(".ssmax")]


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_encoder_of_text(family, implementation):
    softmax = made(family)
    model, plain = converted_and_naive(softmax)
    # albert has one layer, twice; modernbert's second has a window
    assert len(scaled(model)) == (1 if family in ("albert", "modernbert") else 2)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for real in (torch.ones_like(REAL), REAL, REAL.flip(1)):
            if family in ("roberta", "camembert", "xlm-roberta") and not real[:, 0].all():
                continue  # positions follow the tokens, not the mask
            NOW["encoder"] = real[:, None]
            inputs = {"input_ids": TOKENS, "attention_mask": real.long()}
            got = model(**inputs).last_hidden_state
            same(got, plain(**inputs).last_hidden_state, implementation, real)
            assert (got - softmax(**inputs).last_hidden_state)[real].abs().max() > 1e-4
        alone = model(input_ids=TOKENS[:1, :6]).last_hidden_state
        same(model(input_ids=TOKENS, attention_mask=REAL.long()).last_hidden_state[:1, :6], alone, implementation)


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_encoder_of_images(family, implementation):
    softmax = made(family)
    with pytest.raises(ValueError, match="needs train_length"):
        ssmax.convert(softmax)
    model, plain = converted_and_naive(softmax)
    assert len(scaled(model)) == 2
    model.set_attn_implementation(implementation)
    NOW["encoder"] = torch.ones(1, 1, 1, dtype=torch.bool)
    pixels = torch.randn(2, 3, 16, 16).double()
    with torch.no_grad():
        got = model(pixels).last_hidden_state
        same(got, plain(pixels).last_hidden_state, implementation)
        assert (got - softmax(pixels).last_hidden_state).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("swin", {"embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2}),
        *(("beit", {f"use_{which}relative_position_bias": True}) for which in ("", "shared_")),
        ("doge", {}),
        ("parakeet_encoder", {"num_mel_bins": 16, "subsampling_conv_channels": 8}),
        ("umt5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    ],
)
def test_a_bias_of_positions_is_refused_while_it_is_zero(family, changes):
    model = made(family, **changes)
    with pytest.raises(ValueError, match="adds a bias to its logits"):
        ssmax.convert(model, 0.5)
    assert not scaled(model)


@pytest.mark.parametrize("family", TRANSLATION)
@pytest.mark.parametrize("cross", [False, True])
def test_an_encoder_decoder_whole_and_cached(family, cross):
    softmax = made(family)
    model, plain = converted_and_naive(softmax, cross=cross)
    assert len(scaled(model)) == (6 if cross else 4)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        for real in (torch.ones_like(REAL), REAL):
            NOW.update(encoder=real[:, None], cross=real[:, None], decoder=torch.ones(1, 6, 6, dtype=torch.bool).tril())
            inputs = {"input_ids": TOKENS, "attention_mask": real.long()}
            with torch.no_grad():
                want = plain(**inputs, decoder_input_ids=TARGET, use_cache=False).last_hidden_state
                got = model(**inputs, decoder_input_ids=TARGET, use_cache=False)
                same(got.last_hidden_state, want, implementation)
                states, cache, parts = (got.encoder_last_hidden_state,), None, []
                for start, stop in ((0, 4), (4, 5), (5, 6)):
                    piece = {
                        "encoder_outputs": states,
                        "decoder_input_ids": TARGET[:, start:stop],
                        "past_key_values": cache,
                    }
                    step = model(attention_mask=real.long(), **piece, use_cache=True)
                    cache = step.past_key_values
                    parts.append(step.last_hidden_state)
                same(torch.cat(parts, 1), want, implementation)


def test_a_causal_tower_of_text():
    softmax = made("clip_text_model", eos_token_id=98)
    model, plain = converted_and_naive(softmax)
    NOW["encoder"] = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        same(model(TOKENS).last_hidden_state, plain(TOKENS).last_hidden_state, "sdpa")


@pytest.mark.parametrize("cross", [False, True])
def test_speech_whole_and_cached(cross):
    softmax = made("whisper", decoder_start_token_id=1, max_target_positions=12)
    model, plain = converted_and_naive(softmax, cross=cross)
    sound = torch.randn(2, 8, 20).double()
    NOW.update(dict.fromkeys(("encoder", "cross"), torch.ones(1, 1, 1, dtype=torch.bool)))
    NOW["decoder"] = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        want = plain(sound, decoder_input_ids=TARGET, use_cache=False).last_hidden_state
        whole = model(sound, decoder_input_ids=TARGET, use_cache=False)
        same(whole.last_hidden_state, want, "sdpa")
        step = model(encoder_outputs=(whole.encoder_last_hidden_state,), decoder_input_ids=TARGET[:, :5])
        options = {"past_key_values": step.past_key_values, "encoder_outputs": (whole.encoder_last_hidden_state,)}
        same(model(decoder_input_ids=TARGET[:, 5:], **options).last_hidden_state, want[:, 5:], "sdpa")


@pytest.mark.parametrize("family", ["bert", "vit", "bart"])
def test_round_trips_and_back(family, tmp_path):
    softmax = made(family).float()
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16)} if family == "vit" else {"input_ids": TOKENS}
    model = ssmax.convert(copy.deepcopy(softmax), 0.5, bias=True, cross=True)
    with torch.no_grad():
        want, plain = model(**inputs).last_hidden_state, softmax(**inputs).last_hidden_state
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**inputs).last_hidden_state, want)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path).eval()
        assert type(loaded) is type(model)
        assert torch.equal(loaded(**inputs).last_hidden_state, want)
        with pytest.raises(ValueError, match="would drop its scales"):
            type(softmax).from_pretrained(tmp_path)
        for converted in (model, loaded):
            assert torch.equal(ssmax.revert(converted)(**inputs).last_hidden_state, plain)
            assert type(converted) is type(softmax)
            assert list(converted.state_dict()) == list(softmax.state_dict())


def test_identity_is_exact_and_names_are_those_of_the_backbone(tmp_path):
    config = made("bert").config
    headed = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        want = headed(TOKENS).logits
        with ssmax.converted(headed, "identity", layers=["bert.encoder.layer.1.attention.self"]) as model:
            assert torch.equal(model(TOKENS).logits, want)
            assert model.config.ssmax["layers"] == ["encoder.layer.1.attention.self"]
            model.save_pretrained(tmp_path)
            assert scaled(AutoModel.from_pretrained(tmp_path)) == ["encoder.layer.1.attention.self.ssmax"]
        assert torch.equal(headed(TOKENS).logits, want)
    with pytest.raises(ValueError, match="layers must be some of"):
        ssmax.convert(headed, 0.5, layers=["encoder.layer.7.attention.self"])


class OwnModel(LlamaForCausalLM):
    """A class that transformers does not have."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnPair(LlamaForCausalLM):
    config_class = OwnConfig


@pytest.mark.parametrize("kind", [OwnModel, OwnPair])
def test_a_class_of_the_users_own_loads_itself(kind, tmp_path):
    sizes = tiny_config("llama").to_dict()
    sizes.pop("model_type")
    softmax = kind(kind.config_class(**sizes)).eval()
    model = ssmax.convert(copy.deepcopy(softmax), 0.5)
    with torch.no_grad():
        want = model(TOKENS).logits
        assert (want - softmax(TOKENS).logits).abs().max() > 1e-4
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert isinstance(loaded, kind)
        assert torch.equal(loaded(TOKENS).logits, want)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(TOKENS).logits, want)
        with pytest.raises(ValueError, match="would drop its scales"):
            kind.from_pretrained(tmp_path)
        reverted = ssmax.revert(model)
        assert type(reverted) is kind
        assert torch.equal(reverted(TOKENS).logits, softmax(TOKENS).logits)


class Wrapper(LlamaAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class ByHand(LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        q = self.q_proj(hidden_states)
        return (q @ q.mT).softmax(-1) @ q, None


class ItsOwnCall(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        q = hidden_states[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)[:, 0], None


def by_hand(q):
    return (q @ q.mT).softmax(-1) @ q


class ByAHelper(LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        return by_hand(self.q_proj(hidden_states)), None


class Mixed(LlamaForCausalLM):
    """Mixes its logits by an attention of torch's."""

    def __init__(self, config):
        super().__init__(config)
        self.mix = torch.nn.MultiheadAttention(config.vocab_size, 1)


def test_torchs_attention_beside_a_decoders_is_named():
    with pytest.raises(ValueError, match=r"mix \(MultiheadAttention\) attends without"):
        ssmax.convert(Mixed(tiny_config("llama")), 0.5)


def test_attention_of_the_users_own_in_a_decoder():
    model = LlamaForCausalLM(tiny_config("llama"))
    model.model.layers[0].self_attn.__class__ = Wrapper
    assert ssmax.convert(copy.deepcopy(model), 0.5).config.ssmax["layers"] == [0, 1]
    for kind in (ByHand, ByAHelper, ItsOwnCall):
        attention = copy.deepcopy(model.model.layers[1].self_attn)
        attention.__class__ = kind
        model.model.layers[0].self_attn = attention
        with pytest.raises(ValueError, match=rf"layers.0.self_attn \({kind.__name__}\) attends without"):
            ssmax.convert(model, 0.5)
        assert type(model) is LlamaForCausalLM
        assert ssmax.convert(copy.deepcopy(model), 0.5, layers=[1]).config.ssmax["layers"] == [1]


class AndItself(LlamaAttention):
    """Calls the interface, and attends once more by itself."""

    def forward(self, hidden_states, *args, **kwargs):
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return output + torch.nn.functional.scaled_dot_product_attention(*[output.unsqueeze(1)] * 3).squeeze(1), weights


class AroundIt(LlamaDecoderLayer):
    """A layer that attends by itself, around the attention that calls the interface."""

    def forward(self, hidden_states, *args, **kwargs):
        more = torch.nn.functional.scaled_dot_product_attention(*[hidden_states.unsqueeze(1)] * 3).squeeze(1)
        return super().forward(hidden_states + more, *args, **kwargs)


class Explicit(LlamaAttention):
    """Calls its base by name, and has a method that nothing calls."""

    def forward(self, hidden_states, *args, **kwargs):
        return LlamaAttention.forward(self, hidden_states, *args, **kwargs)

    def shown(self, hidden_states):
        return torch.nn.functional.scaled_dot_product_attention(*[hidden_states.unsqueeze(1)] * 3)


@pytest.mark.parametrize("kind", [AndItself, AroundIt, "adaption prompt"])
def test_attention_of_the_users_own_around_what_converts_is_refused(kind):
    model = whole = LlamaForCausalLM(tiny_config("llama", num_key_value_heads=4)).eval()
    layer = model.model.layers[0]
    if kind is AroundIt:
        layer.__class__ = kind
    elif kind is AndItself:
        layer.self_attn.__class__ = kind
    else:
        whole = get_peft_model(model, AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1))
    with pytest.raises(ValueError, match=r"\) attends without"):
        ssmax.convert(whole, 0.5)
    assert not scaled(model)


def test_methods_that_a_forward_does_not_call_are_let_be():
    model = LlamaForCausalLM(tiny_config("llama")).eval()
    model.model.layers[0].self_attn.__class__ = Explicit
    assert ssmax.convert(model, 0.5).config.ssmax["layers"] == [0, 1]


def test_a_model_and_a_part_of_it_are_not_both_converted():
    model = AutoModelForSequenceClassification.from_config(made("bert").config)
    ssmax.convert(model.bert, 0.5)
    with pytest.raises(ValueError, match=r"bert.encoder.layer.0.attention.self has a scale already"):
        ssmax.convert(model, 0.5)
    ssmax.revert(model.bert)
    ssmax.convert(model, 0.5)
    assert model.bert.config is model.config
    with pytest.raises(ValueError, match=r"encoder.layer.0.attention.self has a scale already"):
        ssmax.convert(model.bert, 0.5)
    assert len(scaled(model)) == 2


class Around(torch.nn.Module):
    """Wraps a layer, as tools for steering do, or takes its place and passes its input on."""

    def __init__(self, layer=None):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states if self.layer is None else self.layer(hidden_states, *args, **kwargs)


def test_layers_may_be_wrapped_or_passed_by():
    model = ssmax.convert(LlamaForCausalLM(tiny_config("llama")).eval(), 0.5)
    want = model(TOKENS).logits
    layers = model.model.layers
    layers[1] = Around(layers[1])
    assert torch.equal(model(TOKENS).logits, want)
    layers[1] = Around(LlamaForCausalLM(tiny_config("llama")).model.layers[1])
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn was converted to SSMax and its scale is gone"):
        model(TOKENS)
    layers[1] = Around()
    assert model(TOKENS).logits.isfinite().all()


def test_a_decoder_whose_part_was_converted_and_reverted_converts():
    model = LlamaForCausalLM(tiny_config("llama")).eval()
    want = model(TOKENS).logits
    ssmax.revert(ssmax.convert(model.model, 0.5))
    ssmax.convert(model, "identity")
    torch.testing.assert_close(model(TOKENS).logits, want, atol=1e-5, rtol=0)
    assert torch.equal(ssmax.revert(model)(TOKENS).logits, want)


@pytest.mark.parametrize("head", [LlamaForSequenceClassification, LlamaForTokenClassification])
def test_a_head_that_was_loaded_reverts_with_the_model_inside(head, tmp_path):
    model = head(tiny_config("llama", pad_token_id=0)).eval()
    want = model(TOKENS).logits
    ssmax.convert(model, 0.5).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(ssmax.revert(loaded)(TOKENS).logits, want)
    assert [type(part).__name__ for part in (loaded, loaded.model)] == [head.__name__, "LlamaModel"]
    assert torch.equal(ssmax.convert(loaded, 0.5)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("place", [0, 2])
def test_layers_that_are_added_need_a_scale(family, place, tmp_path):
    softmax = LlamaForCausalLM(tiny_config("llama")).eval() if family == "llama" else made("bert").float()
    model = ssmax.convert(copy.deepcopy(softmax), 0.5)
    layers, fresh = (m.model.layers if family == "llama" else m.encoder.layer for m in (model, softmax))
    layers.insert(place, fresh[1])
    said = "its scale is gone" if place == 0 else "was added or replaced after the conversion"
    with pytest.raises(ValueError, match=said):
        model(TOKENS)
    with pytest.raises(ValueError, match=rf"{said}|none in \['?(encoder.layer.)?0"):
        model.save_pretrained(tmp_path)
    del layers[place]
    layers.insert(place, copy.deepcopy(layers[1]))
    assert model(TOKENS, use_cache=False)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"the model has 3|several self-attention modules in layer 1"):
        model.save_pretrained(tmp_path)
    del layers[1:]
    model(TOKENS, use_cache=False)
    with pytest.raises(ValueError, match="and the model has 1"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("way", ["deleted", "none", "replaced"])
def test_a_scale_that_is_gone_is_missed(family, way):
    softmax = LlamaForCausalLM(tiny_config("llama")) if family == "llama" else made("bert").float()
    model = ssmax.convert(copy.deepcopy(softmax.eval()), 0.5)
    name, module = next((name, m) for name, m in model.named_modules() if "ssmax" in m._modules)
    if way == "deleted":
        del module.ssmax
    elif way == "none":
        module.ssmax = None
    else:
        model.set_submodule(name, copy.deepcopy(softmax.get_submodule(name)))
    with pytest.raises(ValueError, match=f"{name} was converted to SSMax and its scale is gone"):
        model(TOKENS)
    if way != "replaced":  # also where the forward of the whole is not that of the converted class
        with pytest.raises(ValueError, match="its scale is gone"):
            (model.model if family == "llama" else model.encoder.layer[0])(
                *([TOKENS] if family == "llama" else [torch.randn(1, 5, 32)])
            )
    assert torch.equal(ssmax.revert(model)(TOKENS)[0], softmax(TOKENS)[0])


def test_layers_that_were_cut_off_are_not_missed():
    model = ssmax.convert(LlamaForCausalLM(tiny_config("llama")), 0.5)
    model.model.layers = model.model.layers[:1]
    assert model(TOKENS).logits.isfinite().all()
