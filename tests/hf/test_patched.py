"""Code that takes the place of a converted model's attention, as libraries that patch models do, is noticed: it is softmax."""

import copy
import functools
import re
import types

import pytest
import torch
from test_named_families import TEXT, TRANSLATION, VISION, made
from tiny_models import tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

import ssmax

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(3))


def heads(x):
    return x.unflatten(-1, (-1, 8)).transpose(1, 2)


def llama_attention(self, hidden_states, *args, **kwargs):
    parts = [heads(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj)]
    output = scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
    return self.o_proj(output.transpose(1, 2).flatten(2)), None


def bert_attention(self, hidden_states, *args, **kwargs):
    parts = [heads(project(hidden_states)) for project in (self.query, self.key, self.value)]
    return scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2), None


def llama_layer(self, hidden_states, *args, **kwargs):
    return hidden_states + llama_attention(self.self_attn, self.input_layernorm(hidden_states))[0]


def bert_layer(self, hidden_states, *args, **kwargs):
    return bert_attention(self.attention.self, hidden_states)[0]


FAMILIES = {
    "llama": (
        lambda: tiny_model("llama"), LlamaAttention, llama_attention, LlamaDecoderLayer, llama_layer,
        "model.layers.1.self_attn",
    ),
    "bert": (
        lambda: made("bert").float(), BertSelfAttention, bert_attention, BertLayer, bert_layer,
        "encoder.layer.1.attention.self",
    ),
}  # fmt: skip
parametrized = pytest.mark.parametrize("family", FAMILIES)


@parametrized
@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_patched_class_or_instance_raises_in_each_forward(family, instance, compiled, monkeypatch):
    build, kind, patch, *_, name = FAMILIES[family]
    model = ssmax.convert(build(), 0.5)
    want = model(TOKENS)[0]
    attention = model.get_submodule(name)
    with monkeypatch.context() as patched:
        patched.setattr(
            *((attention, "forward", types.MethodType(patch, attention)) if instance else (kind, "forward", patch))
        )
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        for grad in (True, False):
            # torch.compile wraps what is raised while it traces.
            raises = pytest.raises(Exception if compiled else ValueError, match="did not use its scale")
            with torch.set_grad_enabled(grad), raises:
                run(TOKENS)
        with pytest.raises(ValueError, match="did not use its scale"):
            model.base_model(TOKENS)
    vars(attention).pop("forward", None)  # monkeypatch leaves the bound one
    torch.testing.assert_close(model(TOKENS)[0], want)


@parametrized
def test_a_patched_layer_around_the_attention_raises(family, monkeypatch):
    build, _, _, layer, patch, _ = FAMILIES[family]
    model = ssmax.convert(build(), 0.5)
    monkeypatch.setattr(layer, "forward", patch)
    for run in (model, model.base_model, model):
        with pytest.raises(ValueError, match=r"holds attention that was converted .* did not use its scale"):
            run(TOKENS)
    with pytest.raises(Exception, match="did not use its scale"):
        torch.compile(model, backend="eager", fullgraph=True)(TOKENS)


def parts_of(model):
    """The converted attentions, and the layers that hold converted self-attention."""
    names = [name for name, module in model.named_modules() if getattr(module, "ssmax", None) is not None]
    layers = [re.match(r".*?\.\d+(?=\.)", name) for name in names if not re.search("cross|encoder_attn", name)]
    return [*names, *sorted({layer.group() for layer in layers if layer})]


@pytest.mark.parametrize("family", [*TEXT, *VISION, *TRANSLATION, "whisper"])
def test_a_forward_of_the_softmax_model_in_any_part_raises(family):
    """As a library leaves it that patches the class, but for one instance."""
    model = ssmax.convert(made(family), 0.5, cross=True)
    plain = made(family)
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16).double()} if family in VISION else {"input_ids": TOKENS}
    if family == "whisper":
        inputs = {"input_features": torch.randn(2, 8, 20).double()}
    if family not in (*TEXT, *VISION):
        inputs["decoder_input_ids"] = TOKENS
    names = parts_of(model)
    assert len(names) >= 2
    want = model(**inputs)[0]
    for name in names:
        part = model.get_submodule(name)
        part.forward = plain.get_submodule(name).forward
        with pytest.raises(ValueError, match="did not use its scale"):
            model(**inputs)
        del part.forward
        whole = copy.deepcopy(model)
        whole.set_submodule(name, plain.get_submodule(name))
        with pytest.raises(ValueError, match="its scale is gone"):
            whole(**inputs)
    assert torch.equal(model(**inputs)[0], want)


@parametrized
def test_what_was_patched_before_is_refused(family, monkeypatch):
    build, kind, patch, *_, name = FAMILIES[family]
    model = build()
    attention = model.get_submodule(name)
    attention.forward = types.MethodType(patch, attention)
    before = type(model), copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=r"attends without|does not pass through"):
        ssmax.convert(model, 0.5)
    assert (type(model), model.config.to_dict()) == before
    monkeypatch.setattr(kind, "forward", patch)
    with pytest.raises(ValueError, match="does not pass through transformers' attention interface"):
        ssmax.convert(build(), 0.5)


@parametrized
def test_a_forward_that_is_wrapped_and_called_is_let_be(family):
    """So do accelerate's hooks."""
    build, *_, name = FAMILIES[family]
    model = build()
    attention = model.get_submodule(name)
    attention.forward = functools.update_wrapper(functools.partial(attention.forward), attention.forward)
    assert len(ssmax.convert(model, 0.5).config.ssmax["layers"]) == 2
    assert model(TOKENS)[0].isfinite().all()


@parametrized
def test_a_plain_attention_put_in_is_missed_under_compile(family):
    build, *_, name = FAMILIES[family]
    plain, model = build(), ssmax.convert(build(), 0.5)
    model.set_submodule(name, plain.get_submodule(name))
    with pytest.raises(Exception, match="its scale is gone"):
        torch.compile(model, backend="eager", fullgraph=True)(TOKENS)


@parametrized
def test_parts_that_are_compiled_still_count(family):
    build, *_ = FAMILIES[family]
    model = ssmax.convert(build(), 0.5)
    want = model(TOKENS)[0]
    for module in model.modules():
        if isinstance(module, (LlamaDecoderLayer, BertLayer)):
            module.compile(backend="eager")
    for length in (7, 5, 7):
        model(TOKENS[:, :length])
    torch.testing.assert_close(model(TOKENS)[0], want)


def test_a_converted_model_inside_a_converted_model_counts_for_both(tmp_path):
    """transformers builds the backbone of a classifier by an Auto class."""
    config = tiny_model("llama").config
    ssmax.convert(LlamaForSequenceClassification(config), 0.5).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(model.model).__name__ == "SSMaxLlamaModel"
    assert model(TOKENS[:1]).logits.isfinite().all()


def test_layers_that_do_not_run_are_not_missed():
    """In a whole that has parts, early exits and layers that drop out, converted layers may be passed by."""
    dropping = ssmax.convert(tiny_model("opt", layerdrop=0.999), 0.5).train()
    assert dropping(TOKENS).logits.isfinite().all()
    early = ssmax.convert(tiny_model("llama"), 0.5, layers=[1])
    early.config.num_hidden_layers = 1
    assert early(TOKENS).logits.isfinite().all()
    fewer = ssmax.convert(tiny_model("llama"), 0.5, layers=[1])
    del fewer.model.layers[1]
    assert fewer(TOKENS, use_cache=False).logits.isfinite().all()
    speech = made("bart").float()
    half = ssmax.convert(speech, 0.5, layers=["encoder.layers.0.self_attn"])
    states = half.encoder(TOKENS)
    assert half(encoder_outputs=states, decoder_input_ids=TOKENS)[0].isfinite().all()


@parametrized
def test_revert_takes_the_watch_off(family, monkeypatch):
    build, kind, patch, *_ = FAMILIES[family]
    model = ssmax.revert(ssmax.convert(build(), 0.5))
    assert not any(module._forward_hooks for module in model.modules())
    monkeypatch.setattr(kind, "forward", patch)
    assert model(TOKENS)[0].isfinite().all()
