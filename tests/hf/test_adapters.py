"""PEFT around converted models: an adapter carries the scales, and goes onto a model that has them."""

import copy

import pytest
import torch
from tiny_models import tiny_config
from transformers import LlamaForCausalLM

import ssmax
import ssmax.hf

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def softmax():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config("llama")).eval()


def converted(softmax, init=0.5, **options):
    return ssmax.convert(copy.deepcopy(softmax), init, **{"bias": True} | options)


def wrapped(model, **options):
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def move_scales(model):
    for name, parameter in model.named_parameters():
        if ".ssmax." in name and "original_module" not in name:
            parameter += 0.1 + torch.rand_like(parameter)
    return model


def load(model, folder):
    return peft.PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def test_convert_and_revert_around(softmax):
    model = wrapped(copy.deepcopy(softmax))
    want = model(TOKENS).logits
    assert ssmax.convert(model, 0.5) is model
    assert (model(TOKENS).logits - want).abs().max() > 1e-4
    assert torch.equal(ssmax.revert(model)(TOKENS).logits, want)


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "converted_first"),  # PEFT looks for modules_to_save when it wraps
    [({}, True), ({}, False), ({"modules_to_save": ["ssmax"]}, True)],
)
def test_an_adapter_holds_the_scales(softmax, tmp_path, options, converted_first):
    if converted_first:
        model = wrapped(converted(softmax), **options)
    else:
        model = ssmax.convert(wrapped(copy.deepcopy(softmax)), 0.5, bias=True)
    want = move_scales(model)(TOKENS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(load(converted(softmax, "identity"), tmp_path)(TOKENS).logits, want)
    for other in (copy.deepcopy(softmax), converted(softmax, bias=False), converted(softmax, layers=[1])):
        with pytest.raises(ValueError, match="the adapter holds SSMax scales"):
            load(other, tmp_path)


@torch.no_grad()
def test_an_adapter_of_a_softmax_model_says_that_it_has_none(softmax, tmp_path, caplog):
    wrapped(copy.deepcopy(softmax)).save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(__import__("logging").getLogger("transformers"), "propagate", True)
        load(converted(softmax), tmp_path)
    assert "the adapter holds no SSMax scales" in caplog.text
    load(copy.deepcopy(softmax), tmp_path)


@torch.no_grad()
def test_two_adapters_never_share_what_differs(softmax, tmp_path):
    for name, options in (("fixed", {}), ("own", {"modules_to_save": ["ssmax"]})):
        first, second = (move_scales(wrapped(converted(softmax), **options)) for _ in range(2))
        wants = [model(TOKENS).logits for model in (first, second)]
        for model, place in ((first, "first"), (second, "second")):
            model.save_pretrained(tmp_path / name / place)
        both = load(converted(softmax), tmp_path / name / "first")
        both.load_adapter(tmp_path / name / "first", "again")
        if not options:
            with pytest.raises(
                ValueError, match="other SSMax scales than the model's, and the model has a second adapter"
            ):
                both.load_adapter(tmp_path / name / "second", "second")
            continue
        both.load_adapter(tmp_path / name / "second", "second")
        for adapter, want in zip(("default", "second"), wants, strict=True):
            both.set_adapter(adapter)
            assert torch.equal(both(TOKENS).logits, want)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.LNTuningConfig(target_modules=["ssmax"]),
    ],
)
def test_other_kinds_of_adapters(softmax, tmp_path, config):
    model = move_scales(peft.get_peft_model(converted(softmax), config).eval())
    model.save_pretrained(tmp_path)
    base = converted(softmax)
    if isinstance(config, peft.LNTuningConfig):  # the base layer beneath is what the adapter is not about
        base.load_state_dict(model.unload().state_dict())
        model = load(base, tmp_path)
        assert any("ln_tuning_layers" in name for name, _ in model.named_parameters())
        return
    assert torch.equal(load(base, tmp_path)(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
def test_adapters_through_transformers_itself(softmax, tmp_path):
    model = converted(softmax)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    want = move_scales(model)(TOKENS).logits
    model.save_pretrained(tmp_path)
    plain = copy.deepcopy(softmax)
    with pytest.raises(ValueError, match="the adapter holds SSMax scales that the model does not have"):
        plain.load_adapter(tmp_path)
    assert torch.equal(plain(TOKENS).logits, softmax(TOKENS).logits)
    other = converted(softmax)
    other.load_adapter(tmp_path)
    assert torch.equal(other(TOKENS).logits, want)
