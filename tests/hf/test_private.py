"""What ssmax relies on of transformers' and accelerate's private names (ssmax/hf/private.py): each test fails if one is gone."""

import inspect

import accelerate
import pytest
import torch
from accelerate import PartialState
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny_models import tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BertConfig,
    DeiTConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import flash_attention, sdpa_attention
from transformers.models.auto import tokenization_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ssmax.hf import private


@pytest.fixture
def model():
    return tiny_model("llama")


def test_auto_classes_know_which_model_serves_a_config():
    assert AutoModelForCausalLM in private.AUTO_CLASSES
    assert len(private.AUTO_CLASSES) > 30
    assert private.heads_of(AutoModelForCausalLM, LlamaConfig) == (LlamaForCausalLM,)
    assert private.heads_of(AutoModelForMaskedLM, LlamaConfig) == ()
    assert [kind.__name__ for kind in private.heads_of(AutoModelForMaskedLM, BertConfig)] == ["BertForMaskedLM"]
    assert len(private.heads_of(AutoModelForImageClassification, DeiTConfig)) == 2


def test_a_model_type_may_take_the_tokenizer_of_another_one(monkeypatch):
    names, wrong = {"phi3": "TokenizersBackend"}, {"phi3"}
    assert tokenization_auto.TOKENIZER_MAPPING_NAMES["phi3"] == "TokenizersBackend"
    assert "phi3" in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    monkeypatch.setattr(tokenization_auto, "TOKENIZER_MAPPING_NAMES", names)
    monkeypatch.setattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", wrong)
    private.name_tokenizer("ssmax_phi3", "phi3")
    private.name_tokenizer("ssmax_other", "other")
    assert names == {"phi3": "TokenizersBackend", "ssmax_phi3": "TokenizersBackend"}
    assert wrong == {"phi3", "ssmax_phi3"}


def test_config_types_are_transformers_own_or_registered_in_a_dict_that_may_be_replaced(monkeypatch):
    assert private.is_family("llama")
    assert not private.is_family("ssmax_llama")

    class Kind(dict):
        def __contains__(self, key):
            return key == "a_type"

        def __missing__(self, key):
            return LlamaConfig

    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    private.register_configs(Kind)
    assert CONFIG_MAPPING["a_type"] is LlamaConfig
    assert "a_type" in CONFIG_MAPPING
    first = CONFIG_MAPPING._extra_content
    private.register_configs(Kind)
    assert CONFIG_MAPPING._extra_content is first


def test_modules_that_a_class_names_stay_float32_and_it_has_no_file_of_code(tmp_path, model):
    model.save_pretrained(tmp_path)
    attributes = private.class_attributes([*private.float32_modules(LlamaForCausalLM), "lm_head"])
    kind = type("Kind", (LlamaForCausalLM,), attributes)
    assert private.float32_modules(kind)[-1] == "lm_head"
    loaded = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.float32
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert kind._auto_class is None
    assert not kind.is_remote_code()


def test_loading_marks_what_it_loaded_and_ends_with_the_names_that_did_not_fit(tmp_path, model, monkeypatch):
    model.save_pretrained(tmp_path)
    seen, ends, original = [], [], getattr(PreTrainedModel, private.FINISH_LOADING)

    class Kind(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Linear(2, 2)

        def _init_weights(self, module):
            seen.append((type(module).__name__, private.is_initialized(module)))
            super()._init_weights(module)

    def finish(*args, **kwargs):
        ends.append(original(*args, **kwargs))
        return ends[-1]

    monkeypatch.setattr(PreTrainedModel, private.FINISH_LOADING, staticmethod(finish))
    Kind.from_pretrained(tmp_path)
    assert ("Linear", False) in seen
    assert set(ends[0].missing_keys) == {"extra.weight", "extra.bias"}
    assert not ends[0].unexpected_keys
    assert not ends[0].mismatched_keys
    whole = LlamaForCausalLM.from_pretrained(tmp_path)
    assert private.is_initialized(whole.lm_head)


def test_an_adapter_that_transformers_loaded_is_noted(model):
    peft = pytest.importorskip("peft")
    assert not private.holds_adapter(model)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    assert private.holds_adapter(model)


def test_a_model_has_a_tensor_parallel_plan_that_is_its_own_dict(model):
    ranks, plan = private.tensor_parallel(model)
    assert ranks == 1
    assert plan["model.layers.*.self_attn.q_proj"] == "colwise"
    plan["model.layers.*.self_attn.ssmax.weight"] = "colwise"
    assert "model.layers.*.self_attn.ssmax.weight" in private.tensor_parallel(model)[1]
    assert "_tp_size" in inspect.getsource(inspect.getmodule(PreTrainedModel))


def test_the_config_names_attention_and_source(tmp_path, model):
    model.set_attn_implementation("eager")
    assert private.implementation_of(model.config) == "eager"
    private.set_implementation(model.config, "sdpa")
    assert private.implementation_of(model.config) == "sdpa"
    model.save_pretrained(tmp_path)
    assert getattr(LlamaForCausalLM.from_pretrained(tmp_path).config, private.NAME_KEY) == str(tmp_path)


def test_positions_that_restart_are_packed_documents():
    assert private.is_packed_sequence(torch.tensor([[0, 1, 2, 0, 1]]), 1)
    assert not private.is_packed_sequence(torch.arange(5)[None], 1)
    assert not private.is_packed_sequence(None, 1)


def test_kernels_of_flash_attention_call_one_function():
    inner = private.inner_flash(flash_attention.flash_attention_forward)
    assert inner.__module__.startswith("transformers.")
    assert private.inner_flash(sdpa_attention.sdpa_attention_forward) is None
    assert private.inner_flash(torch.nn.Identity()) is None


def test_accelerates_hooks_say_where_a_module_computes(model):
    assert private.forward_hooks(model) == []
    attention = model.model.layers[0].self_attn
    add_hook_to_module(attention, AlignDevicesHook(execution_device="cpu"))
    add_hook_to_module(attention, AlignDevicesHook(execution_device="meta"), append=True)
    assert [hook.execution_device for hook in private.forward_hooks(model)] == ["cpu", "meta"]


def test_accelerates_state_is_one_dict_of_the_process():
    state = PartialState(cpu=True)
    assert private.accelerator_state()["distributed_type"] == state.distributed_type
    assert accelerate.state.PartialState._shared_state is private.accelerator_state()


def test_the_trainer_sums_losses_and_calls_what_is_overridden(tmp_path, model):
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True, max_steps=2, report_to=[], logging_steps=5),
                      train_dataset=[{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16)  # fmt: skip
    trainer.train()
    total, step = private.unlogged_loss(trainer)
    assert total > 0
    assert step == 0
    assert private.unlogged_loss(trainer, (1.0, 1)) == (pytest.approx(total + 1), 1)
    source = inspect.getsource(Trainer)
    for name, parameters in {
        "_get_train_sampler": ["train_dataset"],
        "_clip_grad_norm": ["model"],
        "_save_checkpoint": ["model", "trial"],
        "_prepare_inputs": ["inputs"],
    }.items():
        assert f"self.{name}(" in source or f"sampler_fn=self.{name}" in source, name
        assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == parameters


def test_a_push_to_a_hub_uploads_what_changed():
    push = PreTrainedModel.push_to_hub
    assert "self._upload_modified_files(" in inspect.getsource(push)
    parameters = list(inspect.signature(PreTrainedModel._upload_modified_files).parameters)
    assert parameters[1:4] == ["working_dir", "repo_id", "files_timestamps"]
