"""Every way in which transformers loads a model: a converted one comes with its scale, or not at all."""

import copy
import json
import logging as python_logging
import shutil

import peft
import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch, load_checkpoint_in_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

import ssmax
import ssmax.hf
from ssmax.hf.checkpoint import SSMaxLlamaForCausalLM
from ssmax.model_folders import convert_folder

TOKENS = torch.arange(3, 21)[None]
LAWS = ["ssmax", "ssmax-fixed"]


@pytest.fixture
def folders(tmp_path):
    """A plain model, and the same converted, learned (another s in each head) and by a law without parameters."""
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path / "plain")
    for law in LAWS:
        model = ssmax.convert(copy.deepcopy(plain), law=law)
        with torch.no_grad():
            for at, parameter in enumerate(p for name, p in model.named_parameters() if ".ssmax." in name):
                parameter.copy_(torch.arange(4) / 5 + 0.3 + at)
        model.save_pretrained(tmp_path / law)
    return tmp_path


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def scales(model):
    return [p for name, p in model.named_parameters() if "ssmax." in name]


def skeleton(config):
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    "load",
    [
        lambda folder, config, plain: AutoModelForCausalLM.from_pretrained(folder, config=plain),
        lambda folder, config, plain: LlamaForCausalLM.from_pretrained(folder, config=plain),
        lambda folder, config, plain: LlamaForCausalLM.from_pretrained(folder, config=config),
        lambda folder, config, plain: LlamaForCausalLM.from_pretrained(folder),
        lambda folder, config, plain: LlamaForCausalLM.from_pretrained(folder, config=str(folder)),
        lambda folder, config, plain: LlamaModel.from_pretrained(folder, config=plain),
        lambda folder, config, plain: AutoModel.from_pretrained(folder, config=plain),
        lambda folder, config, plain: LlamaForCausalLM(config),
        lambda folder, config, plain: LlamaForCausalLM(copy.deepcopy(config)),
        lambda folder, config, plain: LlamaModel(config),
        lambda folder, config, plain: LlamaForCausalLM._from_config(config),
        lambda folder, config, plain: LlamaForCausalLM(LlamaConfig(**config.to_dict())),
        lambda folder, config, plain: LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict())),
        lambda folder, config, plain: LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=load_file(folder / "model.safetensors")
        ),
        lambda folder, config, plain: (
            type(config).from_pretrained(folder.with_name("plain"))
            and SSMaxLlamaForCausalLM.from_pretrained(folder.with_name("plain"))
        ),
    ],
)
def test_a_plain_class_or_config_is_refused_for_a_converted_model(folders, law, load, record):
    config, plain = AutoConfig.from_pretrained(folders / law), AutoConfig.from_pretrained(folders / "plain")
    with pytest.raises(ValueError, match=r"converted model|convert the model again"):
        load(folders / law, config, plain)
    record("a converted model given to a plain class or config", 1)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder, config: AutoModelForCausalLM.from_pretrained(folder / "plain", config=config),
        lambda folder, config: SSMaxLlamaForCausalLM.from_pretrained(folder / "plain", config=config),
        lambda folder, config: SSMaxLlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=load_file(folder / "plain" / "model.safetensors")
        ),
        lambda folder, config: LlamaForCausalLM.from_pretrained(
            None,
            config=AutoConfig.from_pretrained(folder / "plain"),
            state_dict=load_file(folder / "ssmax" / "model.safetensors"),
        ),
        lambda folder, config: AutoModelForQuestionAnswering.from_pretrained(
            folder / "ssmax"
        ),  # other names of weights
    ],
)
def test_weights_without_the_scales_of_their_config_are_refused(folders, load, record):
    with pytest.raises(ValueError, match="SSMax scales do not fit"):
        load(folders, AutoConfig.from_pretrained(folders / "ssmax"))
    record("weights without the scales of their config", 1)


def test_a_scale_of_another_shape_is_refused_where_mismatches_are_ignored(folders):
    path = folders / "ssmax" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.ssmax.weight"] = torch.ones(3)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="mismatched keys"):
        AutoModelForCausalLM.from_pretrained(folders / "ssmax", ignore_mismatched_sizes=True)


def test_a_folder_whose_config_forgot_everything_is_refused_by_its_weights_names(folders):
    (folders / "ssmax" / "config.json").write_bytes((folders / "plain" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="unexpected keys"):
        AutoModelForCausalLM.from_pretrained(folders / "ssmax")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"s": "0.5"}, "finite numbers"),
        ({"s": float("nan")}, "finite numbers"),
        ({"b": None}, "finite numbers"),
        ({"bias": 1}, "bias true or false"),
        ({"layers": []}, "must name layers"),
        ({"layers": [0, 0]}, "must name layers"),
        ({"layers": [0, True]}, "must name layers"),
        ({"layers": ["0"]}, "names layers"),
        ({"layers": [0]}, "unexpected keys"),
        ({"parameters": {}}, "must hold"),
        ({"b": 1.0}, "needs bias=True"),
    ],
)
def test_a_recipe_edited_by_hand_is_refused(folders, change, words, record):
    path = folders / "ssmax" / "config.json"
    config = json.loads(path.read_text())
    config["ssmax"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(folders / "ssmax")
    record("a scale's recipe edited by hand", 1)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    "load",
    [
        AutoModelForCausalLM.from_pretrained,
        SSMaxLlamaForCausalLM.from_pretrained,
        lambda folder: AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder)),
        lambda folder: AutoModelForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True, dtype="auto"),
        lambda folder: AutoModelForCausalLM.from_pretrained(folder, device_map="cpu"),
        lambda folder: AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True),
        lambda folder: AutoModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name),
        lambda folder: SSMaxLlamaForCausalLM.from_pretrained(
            None,
            config=AutoConfig.from_pretrained(folder),
            state_dict=AutoModelForCausalLM.from_pretrained(folder).state_dict(),
        ),
        lambda folder: load_checkpoint_and_dispatch(
            skeleton(AutoConfig.from_pretrained(folder)), folder, device_map={"": "cpu"}
        ),
        lambda folder: pipeline("text-generation", model=str(folder), tokenizer=tokenizer()).model,
    ],
)
def test_the_same_model_by_every_way(folders, law, load):
    want = logits(AutoModelForCausalLM.from_pretrained(folders / law))
    assert not torch.equal(want, logits(AutoModelForCausalLM.from_pretrained(folders / "plain")))
    assert torch.equal(logits(load(folders / law)), want)


def tokenizer():
    core = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, "a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_buffers_that_are_not_saved_have_their_values(tmp_path):
    """transformers computes Falcon-H1's multipliers anew when it loads its own models, and not in all custom code."""
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    model = ssmax.convert(tiny_model("falcon_h1", ssm_multipliers=[0.3, 0.5, 0.7, 1.1, 1.3], **mamba), 0.5)
    model.save_pretrained(tmp_path)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    assert any("mup_vector" in name for name in loaded)
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded[name], buffer), name


def test_a_class_with_another_base_loads_and_saves(tmp_path):
    """vLLM appends a base to the class of a model."""
    model = ssmax.convert(tiny_model("llama"), 0.5)
    kind = type("Compiled", (type(model),), {"__module__": __name__})
    kind.__bases__ += (type("Wrapper", (), {}),)
    model.save_pretrained(tmp_path / "first")
    kind.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "second")), logits(model))


def test_a_class_with_the_config_of_another_family_is_refused():
    """Its Auto class makes a Llama of an InternLM3 config."""
    model = tiny_model("internlm3")
    with pytest.raises(ValueError, match=r"'internlm3' and the class LlamaForCausalLM has 'llama'"):
        ssmax.convert(model)
    assert type(model) is LlamaForCausalLM


@pytest.mark.parametrize("options", [{"max_shard_size": "5KB"}, {"variant": "half"}])
def test_sharded_and_variant_files(folders, options):
    model = AutoModelForCausalLM.from_pretrained(folders / "ssmax")
    model.save_pretrained(folders / "new", **options)
    names = [path.name for path in (folders / "new").glob("*.safetensors")]
    assert len(names) > 3 or names == ["model.half.safetensors"]
    options.pop("max_shard_size", None)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folders / "new", **options)), logits(model))
    for path in (folders / "new").glob("*.safetensors"):  # a shard without the scales that the index promises
        save_file(
            {k: v for k, v in load_file(path).items() if ".ssmax." not in k} or {"none": torch.ones(1)},
            path,
            metadata={"format": "pt"},
        )
    with pytest.raises(ValueError, match="missing keys"):
        AutoModelForCausalLM.from_pretrained(folders / "new", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto", torch.float64])
def test_s_stays_float32_in_every_dtype(folders, dtype):
    want = scales(AutoModelForCausalLM.from_pretrained(folders / "ssmax"))
    found = scales(AutoModelForCausalLM.from_pretrained(folders / "ssmax", dtype=dtype))
    assert len(found) == 2
    for mine, other in zip(found, want, strict=True):
        assert mine.dtype in (torch.float32, dtype)
        assert torch.equal(mine.float(), other)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_other_tasks_have_the_scales(folders, auto):
    want = scales(AutoModelForCausalLM.from_pretrained(folders / "ssmax"))
    model = auto.from_pretrained(folders / "ssmax")
    assert all(torch.equal(mine, other) for mine, other in zip(scales(model), want, strict=True))
    model.save_pretrained(folders / "task")
    again = AutoModelForCausalLM.from_pretrained(folders / "task")  # and back: from a backbone alone, too
    assert all(torch.equal(mine, other) for mine, other in zip(scales(again), want, strict=True))


def test_a_task_that_the_family_has_not_is_an_error(folders):
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSeq2SeqLM.from_pretrained(folders / "ssmax")


def test_from_config_starts_the_scales(folders):
    config = AutoConfig.from_pretrained(folders / "ssmax")
    for model in (AutoModelForCausalLM.from_config(config), SSMaxLlamaForCausalLM(config)):
        assert all(scale.tolist() == pytest.approx([config.ssmax["s"]] * 4) for scale in scales(model))
    with pytest.raises(ValueError, match=r"config\.ssmax is missing"):
        AutoModelForCausalLM.from_config(AutoConfig.for_model("ssmax_llama"))


@pytest.mark.parametrize("load", [load_checkpoint_and_dispatch, load_checkpoint_in_model])
@pytest.mark.parametrize("places", [{"": "cpu"}, {"model.layers.0": "disk", "": "cpu"}])
def test_accelerate_cannot_run_a_skeleton_without_its_scale(folders, load, places):
    model = skeleton(AutoConfig.from_pretrained(folders / "ssmax"))

    def load_and_run():
        load(model, folders / "plain", device_map=places, offload_folder=folders / "store")
        logits(model)

    with pytest.raises((RuntimeError, ValueError, NotImplementedError, KeyError), match=r"meta|ssmax"):
        load_and_run()


def test_a_skeleton_made_empty_starts_with_the_start(folders):
    model = skeleton(AutoConfig.from_pretrained(folders / "ssmax")).to_empty(device="cpu")
    assert all(scale.tolist() == pytest.approx([model.config.ssmax["s"]] * 4) for scale in scales(model))


def test_a_state_dict_without_scales_is_refused_or_warned_of(folders, caplog):
    model = AutoModelForCausalLM.from_pretrained(folders / "ssmax")
    state = AutoModelForCausalLM.from_pretrained(folders / "plain").state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*ssmax\.weight"):
        model.load_state_dict(state)
    python_logging.getLogger("transformers").propagate = True
    try:
        model.load_state_dict({"lm_head.weight": state["lm_head.weight"]}, strict=False)  # a part is no loss
        model.load_state_dict(model.state_dict(), strict=False)
        assert not caplog.records
        model.load_state_dict(state, strict=False)
    finally:
        python_logging.getLogger("transformers").propagate = False
    assert "but not its SSMax scale" in caplog.text


def test_nothing_is_saved_that_could_not_be_loaded(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "ssmax")
    lacking = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.self_attn.ssmax" not in name}
    with pytest.raises(ValueError, match=r"lacks the SSMax scale of model\.layers\.1\.self_attn"):
        model.save_pretrained(folders / "new", state_dict=lacking)
    with pytest.raises(ValueError, match=r"lacks the SSMax scale of model\.layers\.1\.self_attn"):
        model.save_pretrained(folders / "new", True, lacking)
    model.save_pretrained(folders / "whole", state_dict=model.state_dict())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folders / "whole")), logits(model))
    del model.model.layers[0].self_attn.ssmax
    with pytest.raises(ValueError, match=r"layers \[0, 1\], and the model has 1, none in \[0\]"):
        model.save_pretrained(folders / "new")
    assert not (folders / "new").exists()


def test_resized_embeddings_keep_the_scales(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "ssmax")
    want = logits(model)
    model.resize_token_embeddings(105)
    model.save_pretrained(folders / "new")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folders / "new"))[..., :99], want)


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_a_converted_model(folders):
    base = AutoModelForCausalLM.from_pretrained(folders / "ssmax")
    options = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["ssmax"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, options)
    with torch.no_grad():
        for parameter in scales(adapted):
            parameter.add_(0.25)
    adapted.save_pretrained(folders / "adapter")
    want = logits(adapted)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "ssmax"), folders / "adapter")
    assert torch.equal(logits(again), want)
    through_transformers = AutoModelForCausalLM.from_pretrained(folders / "adapter")
    assert torch.equal(logits(through_transformers), want)
    merged = again.merge_and_unload()
    merged.save_pretrained(folders / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folders / "merged")), want, rtol=0, atol=1e-4
    )
    path = folders / "ssmax" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if ".ssmax." not in k}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing keys"):
        AutoModelForCausalLM.from_pretrained(folders / "adapter")


def test_a_converted_family_has_the_tokenizer_of_its_own(tmp_path):
    """Where no file names the tokenizer's class, the model's family does."""
    model = tiny_model("gpt2")
    found = []
    for name in ("plain", "converted"):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
        (tmp_path / name / "merges.txt").write_text("#version: 0.2\na b\n")
        found.append(AutoTokenizer.from_pretrained(tmp_path / name))
        model = ssmax.convert(model) if name == "plain" else model
    assert type(found[0]) is type(found[1]) is GPT2Tokenizer
    assert found[1]("abba")["input_ids"] == found[0]("abba")["input_ids"] == [2, 1, 0]


WORDS = {token: index for index, token in enumerate(["<unk>", "<s>", "▁", "a", "1", "2", "Ġ", "12", "▁a"])}
# Families whose tokenizer.json AutoTokenizer takes as it stands, although a file names a class that would build another one.
MISNAMED = {
    "olmo3": ("GPT2Tokenizer", None, pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])),
    "phi3": ("LlamaTokenizer", normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
}  # fmt: skip


@pytest.mark.parametrize("family", MISNAMED)
def test_a_converted_model_reads_texts_as_its_source_does(family, tmp_path):
    named, normalizer, splitter = MISNAMED[family]
    core = Tokenizer(models.BPE(WORDS, [("1", "2"), ("▁", "a")], unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizer, splitter
    core.add_special_tokens(["<unk>", "<s>"])
    source = tmp_path / "source"
    tiny_model(family).save_pretrained(source)
    core.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named, "unk_token": "<unk>"}))
    convert_folder(str(source), tmp_path / "by command", dry_run=False, layers=[0, 1])
    ssmax.convert(AutoModelForCausalLM.from_pretrained(source), layers=[0, 1]).save_pretrained(tmp_path / "by hand")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / file, tmp_path / "by hand" / file)
    texts = ["12 a", " a", "<s>a"]
    want = [AutoTokenizer.from_pretrained(source)(text)["input_ids"] for text in texts]
    for folder in ("by command", "by hand"):
        assert [AutoTokenizer.from_pretrained(tmp_path / folder)(text)["input_ids"] for text in texts] == want
    named_now = json.loads((tmp_path / "by command" / "tokenizer_config.json").read_text())["tokenizer_class"]
    other = GPT2Tokenizer if named == "GPT2Tokenizer" else LlamaTokenizer
    assert named_now == "TokenizersBackend"  # which code without ssmax reads
    assert [other.from_pretrained(source)(text)["input_ids"] for text in texts] != want
