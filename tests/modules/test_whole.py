"""convert, revert, fold and calibrate whole or not at all: whatever fails inside leaves the model exactly as it was."""

import contextlib
import copy
import io
import pickle
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import ssmax
import ssmax.hf

TOKENS = torch.arange(3, 21)[None]
SOURCES = Path(ssmax.__file__).parent


def state(model):
    """All that a change may touch, by identity where it is an object and by value where it is numbers."""
    modules = [
        (name, id(module), type(module), module.training, sorted(vars(module)), id(getattr(module, "config", None)))
        for name, module in model.named_modules()
    ]
    hooks = [
        [id(hook) for hook in table.values()]
        for module in model.modules()
        for name, table in sorted(vars(module).items())
        if name.endswith("_hooks")
    ]
    weights = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return modules, hooks, type(model.config), model.config.to_dict(), weights


def assert_same(found, wanted):
    assert found[:-1] == wanted[:-1]
    assert {name: entry[:2] for name, entry in found[-1].items()} == {n: e[:2] for n, e in wanted[-1].items()}
    assert all(torch.equal(entry[2], wanted[-1][name][2]) for name, entry in found[-1].items())


class Injected(Exception):
    pass


def statements(call, fail_at=None, error=None):
    """Call it and return its statements inside of ssmax, as (file, line); raise at that one of them, if any."""
    met, came = [], False

    def trace(frame, event, argument):
        path = frame.f_code.co_filename
        if not Path(path).is_relative_to(SOURCES) or path.endswith("whole.py"):
            return None
        if event == "line":
            met.append((path, frame.f_lineno))
            if len(met) - 1 == fail_at:
                raise error
        return trace

    sys.settrace(trace)
    try:
        call()
    except (Injected, KeyboardInterrupt):
        came = True
    finally:
        sys.settrace(None)
    return met, came


CHANGES = {
    "convert": (lambda model: model, lambda model: ssmax.convert(model, 0.5, bias=True)),
    "law": (lambda model: model, lambda model: ssmax.convert(model, law="qwen-1")),
    "revert": (ssmax.convert, ssmax.revert),
    "fold": (ssmax.convert, ssmax.fold),
    "calibrate": (lambda model: model, lambda model: ssmax.calibrate(model, TOKENS.repeat(3, 1), length=16, steps=1)),
    "calibrate a converted model": (
        lambda model: ssmax.convert(model, 0.3),
        lambda model: ssmax.calibrate(model, TOKENS.repeat(3, 1), length=16, steps=1),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_failure_at_any_statement_leaves_the_model_as_it_was(change, record):
    prepare, call = CHANGES[change]
    model = prepare(tiny_model("llama", num_hidden_layers=1))
    call(copy.deepcopy(model))  # once before, since classes are made once
    copied = copy.deepcopy(model)
    met, _ = statements(lambda: call(copied))
    model.train()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    before = state(model)
    firsts = sorted({line: at for at, line in reversed(list(enumerate(met)))}.values())
    firsts = firsts[:: 8 if "calibrate" in change else 1]  # a fit takes long
    assert len(firsts) > 10
    with contextlib.redirect_stderr(io.StringIO()):
        for at in firsts:
            # Reading a model tries things that may raise; an interrupt ends these trials too.
            error = KeyboardInterrupt() if at % 2 or "calibrate" in change else Injected()
            again, came = statements(lambda: call(model), at, error)
            assert again == met[: at + 1]
            assert came, f"swallowed at {again[-1]}"
            assert_same(state(model), before)
    record(f"{change} that fails at a statement", len(firsts))


def test_converted_reverts_where_its_body_fails():
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(KeyboardInterrupt), ssmax.converted(model, 0.5):
        raise KeyboardInterrupt
    assert model.config.to_dict() == before[3]
    assert type(model) is LlamaForCausalLM


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "torch.save"])
def test_a_copy_of_a_converted_model_reverts_to_the_same_config(way, tmp_path):
    model = tiny_model("llama")
    model.config.architectures = ["Mine"]
    plain, before = copy.deepcopy(model.config), model.config.to_dict()
    ssmax.convert(model)
    if way == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        copied = way(model)
    for one in (copied, model):
        assert one.config.to_dict() == model.config.to_dict()
        ssmax.revert(one)
        assert one.config.to_dict() == before
        assert one.config.to_json_string() == plain.to_json_string()
        assert not hasattr(one.config, "auto_map")


def test_models_that_share_a_config_are_converted_one_by_one(tmp_path):
    config = tiny_config("llama")
    first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
    ssmax.convert(first, 0.5)
    second.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    assert ssmax.convert(second).config.model_type == "ssmax_llama"
    assert first.config.ssmax["init"] == 0.5
    assert second.config.ssmax["init"] == "matched"
    assert config.model_type == "llama"
    assert not hasattr(ssmax.revert(first).config, "ssmax")
    assert hasattr(second.config, "ssmax")


class Packed(torch.nn.Module):
    """A projection as of GPTQ or AWQ: its weight lies in buffers."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach().to(torch.bfloat16))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.qweight.to(x.dtype))


def packed(model):
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    return model


def dynamic_int8(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore::UserWarning")
@pytest.mark.parametrize("quantise", [packed, dynamic_int8])
def test_quantised_projections_are_converted(quantise):
    model = quantise(tiny_model("llama").bfloat16() if quantise is packed else tiny_model("llama"))
    assert not any(True for _ in model.model.layers[0].self_attn.parameters())
    with torch.no_grad():
        want = model(TOKENS).logits
        before = model.config.to_dict()
        ssmax.convert(model, "identity")
        torch.testing.assert_close(model(TOKENS).logits, want, rtol=0, atol=0)
        ssmax.revert(model)
        ssmax.convert(model, 0.9)
        assert (model(TOKENS).logits - want).abs().max() > 1e-3
    for layer in model.model.layers:
        assert (layer.self_attn.ssmax.s.dtype, layer.self_attn.ssmax.s.device.type) == (torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"no q_proj that is an nn\.Linear"):
        ssmax.fold(model)
    assert ssmax.revert(model).config.to_dict() == before


def place(*offloaded):
    everywhere = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    return {name: "disk" if name in offloaded else "cpu" for name in everywhere}


@pytest.mark.parametrize("offloaded", [["model.layers.0"], ["model.layers.0", "model.layers.1", "lm_head"]])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_offloaded_layers_get_their_scale_where_they_compute(offloaded, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", device_map=place(*offloaded), offload_folder=tmp_path / "store"
    )
    with torch.no_grad():
        plain = model(TOKENS).logits
        before = model.config.to_dict()
        ssmax.convert(model, 0.9, bias=True)
        want = ssmax.convert(tiny_model("llama"), 0.9, bias=True)(TOKENS).logits
        assert all(p.device.type == "cpu" for name, p in model.named_parameters() if ".ssmax." in name)
        assert torch.equal(model(TOKENS).logits, want)
        model.save_pretrained(tmp_path / "converted")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "converted")(TOKENS).logits, want)
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "converted", device_map=place(*offloaded), offload_folder=tmp_path / "other"
        )
        assert torch.equal(again(TOKENS).logits, want)
        with pytest.raises(ValueError, match="offloaded"):
            ssmax.calibrate(again, TOKENS.repeat(3, 1), length=16, steps=1)
        assert torch.equal(ssmax.revert(again)(TOKENS).logits, plain)
        ssmax.revert(ssmax.convert(ssmax.revert(model), 0.9))
        assert torch.equal(model(TOKENS).logits, plain)
        assert model.config.to_dict() == before
        with pytest.raises(ValueError, match="offloaded"):
            ssmax.fold(ssmax.convert(model, 0.9))


def test_offloaded_to_the_cpu_by_accelerate():
    model = tiny_model("llama")
    with torch.no_grad():
        want = ssmax.convert(copy.deepcopy(model), 0.9)(TOKENS).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        ssmax.convert(model, 0.9)
        assert torch.equal(model(TOKENS).logits, want)


def test_a_skeleton_is_converted_on_the_meta_device():
    with init_empty_weights():
        skeleton = LlamaForCausalLM(tiny_config("llama"))
    ssmax.convert(skeleton, 0.5)
    assert all(p.is_meta for p in skeleton.parameters())
    real = tiny_model("llama")
    with torch.device("meta"):  # where new tensors go by default says nothing about where the model is
        ssmax.convert(real, 0.5)
    assert real.model.layers[0].self_attn.ssmax.s.tolist() == [0.5] * 4
