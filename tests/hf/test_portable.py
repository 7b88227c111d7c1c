"""Saved models are complete: their own code computes them where ssmax is not installed, and their card says what they are."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.errors import EntryNotFoundError
from tiny_models import tiny_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import hub

import ssmax
from ssmax.laws import LAWS
from ssmax.model_folders import convert_folder

PROGRAMS = Path(__file__).parent.parent / "programs"
LAW_PARAMETERS = {  # other than the defaults, and so that 30 tokens show it
    "qwen-1": {"train_length": 3},
    "yarn": {"factor": 40.0},
    "llama-4": {"floor": 2},
    "ministral-3": {"scale": 0.5, "length": 3},
    "ssmax-power": {"s": 0.5},
    "query-aware": {"hidden_size": 8},
}
WINDOWED = {"num_hidden_layers": 4, "sliding_window": 5}
# What a family needs to be converted with and without b.
CASES = {
    "llama": ("llama", {}, {"init": 0.5}),
    "llama-b": ("llama", {}, {"init": 0.5, "bias": True}),
    "qwen3": ("qwen3", {}, {"init": 0.5}),
    "qwen3-b": ("qwen3", {}, {"init": 0.5, "bias": True}),
    "olmo3": ("olmo3", WINDOWED, {"init": 0.5, "layers": [1, 3]}),
    "olmo3-b": ("olmo3", WINDOWED, {"init": 0.5, "bias": True, "layers": [0, 1, 2, 3]}),
    "gpt2": ("gpt2", {}, {"init": 0.5}),
    "gpt2-b": ("gpt2", {}, {"init": 0.5, "bias": True, "layers": [1]}),
    "gemma3-b": ("gemma3_text", {**WINDOWED, "num_hidden_layers": 6}, {"init": 0.5, "bias": True, "layers": [0, 5]}),
    "mixtral": ("mixtral", {"tie_word_embeddings": True}, {"init": 0.5}),
    **{
        f"llama-{law}": ("llama", {}, {"law": law, "law_parameters": LAW_PARAMETERS.get(law, {})})
        for law, entry in LAWS.items()
        if law != "ssmax" and not entry.instead
    },
}
GENERATOR = torch.Generator().manual_seed(5)
TOKENS = torch.randint(3, 99, (2, 30), generator=GENERATOR)
MASK = torch.ones_like(TOKENS)
MASK[0, :5] = 0  # left padding


def spread(model):
    """s and b of each head from 0.1 to 0.9: far from softmax."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".ssmax." in name:
            parameter.data.copy_(0.1 + 0.8 * torch.rand(parameter.shape, generator=generator))
    return model


def converted(case):
    family, changes, options = CASES[case]
    return spread(ssmax.convert(tiny_model(family, **changes), **options))


def compute(model):
    batch = {"input_ids": TOKENS, "attention_mask": MASK}
    with torch.no_grad():
        return model(**batch).logits, model.generate(**batch, max_new_tokens=12, do_sample=False)


def program(*arguments, home, code=None):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *(["-c", code] if code else []), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """For each case what one process computed from the folders, first without ssmax."""
    root = tmp_path_factory.mktemp("portable")
    folders = {case: str(root / f"{case}.model") for case in CASES}
    for case, folder in folders.items():
        converted(case).save_pretrained(folder)
    ssmax.convert(tiny_model("gemma2"), 0.5).save_pretrained(root / "softcapped")
    write_tokenizer(folders["llama"])
    jobs = {"tokens": TOKENS, "mask": MASK, "folders": list(folders.values()), "softcapped": str(root / "softcapped")}
    torch.save(jobs, root / "jobs.pt")
    program(PROGRAMS / "without_ssmax.py", root / "jobs.pt", root / "found.pt", home=root / "home")
    found = torch.load(root / "found.pt")
    return {case: found[folder] for case, folder in folders.items()}


SIDES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURES = {**SIDES, "image_size": 16, "patch_size": 8}
# Classes that an Auto class makes of several, that rename weights by class name, and that no Auto class makes.
HEADS = {
    "ViTForImageClassification": PICTURES,
    "DeiTForImageClassification": PICTURES,
    "DeiTForImageClassificationWithTeacher": PICTURES,
    "CLIPVisionModelWithProjection": PICTURES,
    "GPT2DoubleHeadsModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99},
    "Dinov2Backbone": PICTURES,
    "SiglipTextModel": {**SIDES, "vocab_size": 99, "max_position_embeddings": 30},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["with", "without"])
def test_every_class_loads_as_its_card_says(way, tmp_path):
    jobs, wanted = {}, {}
    for name, sizes in HEADS.items():
        kind = getattr(transformers, name)
        torch.manual_seed(0)
        model = spread(ssmax.convert(kind(kind.config_class(**sizes)).eval(), 0.5))
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)} if "image_size" in sizes else {"input_ids": TOKENS}
        model.save_pretrained(tmp_path / name)
        jobs[str(tmp_path / name)] = inputs
        with torch.no_grad():
            below = (
                [model.base_model(**inputs).last_hidden_state]
                if "image_size" in sizes and "Backbone" not in name
                else []
            )
            wanted[str(tmp_path / name)] = [f"SSMax{name}", model(**inputs)[0], *below]
    torch.save(jobs, tmp_path / "jobs.pt")
    program(PROGRAMS / "as_the_card_says.py", way, tmp_path / "jobs.pt", tmp_path / "found.pt", home=tmp_path / "home")
    found = torch.load(tmp_path / "found.pt")
    for folder, (name, *outputs) in wanted.items():
        assert found[folder][0] == name
        for got, want in zip(found[folder][1:], outputs, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_what_wraps_layers_is_not_in_saved_names(tmp_path):
    """FSDP1, activation checkpointing and torch.compile wrap modules; state_dicts that are saved have the clean names."""
    model = converted("llama-b")
    state, want = model.state_dict(), compute(model)[0]
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    model.save_pretrained(tmp_path, state_dict=state)
    assert "_wrapped" not in (tmp_path / "modeling_ssmax.py").read_text() + (tmp_path / "README.md").read_text()
    assert torch.equal(compute(AutoModelForCausalLM.from_pretrained(tmp_path))[0], want)


def test_scales_outside_of_the_base_model_are_refused():
    config = transformers.CLIPSegConfig(
        text_config=SIDES, vision_config=PICTURES, reduce_dim=8, decoder_num_attention_heads=2
    )
    model = transformers.CLIPSegForImageSegmentation(config)
    with pytest.raises(ValueError, match=r"decoder.layers.0.self_attn is not a part of the base model"):
        ssmax.convert(model, 0.5)


def test_a_class_imported_by_its_name_loads(tmp_path):
    kind = transformers.LlamaForTokenClassification
    ssmax.convert(kind(transformers.LlamaConfig(**SIDES, vocab_size=99)), 0.5).save_pretrained(tmp_path / "model")
    code = f"from ssmax.hf.checkpoint import SSMaxLlamaForTokenClassification as K; K.from_pretrained({str(tmp_path / 'model')!r})"
    program(home=tmp_path / "home", code=code)


def test_a_state_dict_without_one_parameter_of_a_scale_is_not_saved(tmp_path):
    model = converted("llama-b")
    for change in (
        lambda state: state.pop("model.layers.1.self_attn.ssmax.bias"),
        lambda state: state.update({f"module.{key}": state.pop(key) for key in list(state)}),
    ):
        state = model.state_dict()
        change(state)
        with pytest.raises(ValueError, match="the state_dict lacks the SSMax scale of model"):
            model.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.iterdir())


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_folder_alone_computes_the_model(computed, case):
    model = converted(case)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits, tokens = compute(model)
        for way, found in computed[case].items():
            torch.testing.assert_close(found[implementation][MASK > 0], logits[MASK > 0], rtol=0, atol=1e-4, msg=way)
            assert torch.equal(found[f"{implementation} tokens"], tokens), way
    assert set(computed[case]) >= {"alone", "then with ssmax", "of ssmax", "of its own class, with ssmax"}
    plain, plain_tokens = compute(ssmax.revert(model))
    assert (plain - logits)[MASK > 0].abs().max() > 0.05
    assert not torch.equal(plain_tokens, tokens), "softmax gives the same tokens: this case shows nothing"


OLD_CODE = "# Needs the package ssmax.\nfrom ssmax.hf.checkpoint import SSMaxLlamaConfig, SSMaxLlamaForCausalLM\n"
WITH_SSMAX = """
import pickle, sys
from pathlib import Path
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
folder, old, pickled = map(Path, sys.argv[1:])
config = pickle.loads(pickled.read_bytes())
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    assert auto.from_config(config).base_model.layers[1].self_attn.ssmax.num_heads == 4
for path in (folder, old):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert getattr(transformers, model.config.architectures[0]) is type(model)  # so does transformers serve
    model.save_pretrained(path / "again")
    assert sorted(p.name for p in (path / "again").glob("*.py")) == ["mlx_ssmax.py", "modeling_ssmax.py"]
    assert "package ssmax is installed" in (path / "again" / "modeling_ssmax.py").read_text()
    assert "SSMax" in type(AutoModelForCausalLM.from_pretrained(path / "again")).__name__
"""


def test_where_ssmax_is_installed_the_code_uses_it_and_old_folders_load(tmp_path):
    model = converted("llama-b")
    for name in ("folder", "old"):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "old" / "modeling_ssmax.py").write_text(OLD_CODE)
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {name: config["auto_map"][name] for name in ("AutoConfig", "AutoModelForCausalLM")}
    path.write_text(json.dumps(config))
    (tmp_path / "pickled").write_bytes(pickle.dumps(model.config))
    program(tmp_path / "folder", tmp_path / "old", tmp_path / "pickled", home=tmp_path / "home", code=WITH_SSMAX)


WITHOUT_SSMAX = """
import sys
sys.modules["ssmax"] = None
import pickle
from pathlib import Path
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import init_hf_modules
source, pickled = map(Path, sys.argv[1:])
if not pickled.exists():
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    pickled.write_bytes(pickle.dumps(model.config))
else:
    init_hf_modules()  # where transformers keeps the code files
    model = AutoModelForCausalLM.from_config(pickle.loads(pickled.read_bytes()))
    assert model.model.layers[1].self_attn.ssmax.bias.shape == (4,)
"""


def test_a_config_of_the_code_file_survives_pickling_into_another_process(tmp_path):
    converted("llama-b").save_pretrained(tmp_path / "folder")
    for _ in range(2):
        program(tmp_path / "folder", tmp_path / "pickled", home=tmp_path / "home", code=WITHOUT_SSMAX)


def test_the_card_shows_no_values_that_are_not_saved(tmp_path):
    model = converted("llama")
    model.save_pretrained(tmp_path)
    assert "| model.layers.0.self_attn |" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path, state_dict={**model.state_dict()})
    assert "| model.layers.0.self_attn |" not in (tmp_path / "README.md").read_text()


def test_auto_map_names_all_heads_of_the_family(tmp_path):
    converted("qwen3").save_pretrained(tmp_path)
    code, names = (
        (tmp_path / "modeling_ssmax.py").read_text(),
        json.loads((tmp_path / "config.json").read_text())["auto_map"],
    )
    assert names.keys() >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    for auto, name in names.items():
        assert f"class {name.removeprefix('modeling_ssmax.')}(" in code
        assert f"    {auto}.register(" in code or auto == "AutoConfig"
    assert len(code.splitlines()) < 280


def test_a_subclass_of_a_converted_class_saves_loads_and_reverts(tmp_path):
    model = converted("llama-b")
    kind = type("Mine", (type(model),), {"__module__": __name__})
    model.save_pretrained(tmp_path / "first")
    kind.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = kind.from_pretrained(tmp_path / "second").eval()
    assert type(again) is kind
    assert torch.equal(compute(again)[0], compute(model)[0])
    assert "`LlamaForCausalLM.from_pretrained`" in (tmp_path / "second" / "README.md").read_text()
    plain = ssmax.revert(again)
    assert type(plain) is LlamaForCausalLM
    assert torch.equal(compute(plain)[0], compute(ssmax.revert(model))[0])


CARD_OF_THE_SOURCE = """---
license: apache-2.0
base_model: someone/base-model
language: [en, de]
datasets: [a/b]
---
Words.
"""


@pytest.mark.parametrize(
    ("source_card", "known"),
    [
        (CARD_OF_THE_SOURCE, {"license": "apache-2.0", "base_model": "someone/base-model", "language": ["en", "de"]}),
        ("No data.", {}),
        ("---\n: [\n---\n", {}),
        ("---\nlicense: |\n  two\n  lines\nbase_model: 'a/b](x'\n---\n", {}),
        ("---\nlicense: other\nlicense_link: LICENSE\n---\n", {"license": "other", "license_link": "LICENSE"}),
        ("---\nlicense: other\nlicense_link: ../x\n---\n", {"license": "other"}),
        ("---\nlicense: other\nlicense_link: [LICENSE, NOTICE]\n---\n", {"license": "other"}),
        (
            "---\nlicense: gemma\nlicense_link: docs/LICENSE\n---\n",
            {"license": "gemma", "license_link": "docs/LICENSE"},
        ),
        (None, {}),
    ],
)
def test_the_card_says_what_the_source_says_and_no_more(tmp_path, source_card, known):
    tiny_model("llama").save_pretrained(tmp_path / "source")
    if source_card is not None:
        (tmp_path / "source" / "README.md").write_text(source_card)
    convert_folder(str(tmp_path / "source"), tmp_path / "target", dry_run=False, init="identity")
    data = metadata_load(tmp_path / "target" / "README.md")
    assert {name: data[name] for name in ("license", "license_link", "base_model", "language") if name in data} == known
    assert set(data["tags"]) == {"ssmax", "scalable-softmax", "long-context", "custom_code", "arxiv:2501.19399"}
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    again.save_pretrained(tmp_path / "again")
    assert metadata_load(tmp_path / "again" / "README.md") == data, "what is known is handed on"


def test_a_license_beside_the_sources_card_is_named_by_its_address(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_bytes())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "_name_or_path": "someone/model"}))
    card = "---\nlicense: other\nlicense_link: ./LICENSE\nbase_model: someone/older\n---\n"
    (tmp_path / "source" / "README.md").write_text(card)
    convert_folder(str(tmp_path / "source"), tmp_path / "target", dry_run=False)
    data = metadata_load(tmp_path / "target" / "README.md")
    assert data["license_link"] == "https://huggingface.co/someone/model/blob/main/LICENSE"
    assert "# someone/model with" in (tmp_path / "target" / "README.md").read_text()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    convert_folder(str(tmp_path / "source"), tmp_path / "other", dry_run=False)
    text = (tmp_path / "other" / "README.md").read_text()
    assert "# LlamaForCausalLM with" in text
    assert "not recorded here; its own card names someone/older as its base model" in text


def test_the_card_of_capped_logits_says_that_its_code_alone_is_not_enough(tmp_path):
    ssmax.convert(tiny_model("gemma2")).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "needs the package ssmax" in text
    assert "alone" not in text


def test_the_card_tells_how_to_load_it_and_what_s_is(tmp_path):
    model = converted("llama-b")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    told = (
        "s log n + b",
        "trust_remote_code=True",
        "`LlamaForCausalLM.from_pretrained`",
        "unexpected keys",
        "weight_decay",
    )
    for words in told:
        assert words in text
    s = model.model.layers[1].self_attn.ssmax.s
    assert f"| model.layers.1.self_attn | {s.min():.4f} |" in text
    assert "pip install ssmax" not in text


def test_a_card_that_was_changed_is_kept_and_another_is_renewed(tmp_path):
    model = converted("llama")
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    model.model.layers[0].self_attn.ssmax.s.data.fill_(0.77)
    model.save_pretrained(tmp_path)
    second = (tmp_path / "README.md").read_text()
    assert "0.7700" in second
    assert "0.7700" not in first
    (tmp_path / "README.md").write_text(second.replace("Load", "load") + "My words.\n")
    mine = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == mine


class Hub:
    """What transformers asks of a hub when it pushes; a hub cannot be run here."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **options):
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self, repo_id, operations, **options):
        self.files = {op.path_in_repo: Path(op.path_or_fileobj).read_text(errors="replace") for op in operations}


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub"])
@pytest.mark.parametrize("there", [None, "# Of the user\n"])
def test_a_push_includes_the_code_and_the_card(tmp_path, monkeypatch, way, there):
    """there: the card that the user has in the folder, or in the repository."""
    site, model, folder = Hub(), converted("llama"), tmp_path / "model"

    def load(repo_id, **options):
        if there is None or way == "save_pretrained":
            raise EntryNotFoundError("no card")
        return ModelCard(there)

    for module in (hub, sys.modules["transformers.modeling_utils"]):
        monkeypatch.setattr(module, "hf_api", lambda: site)
    monkeypatch.setattr(hub, "ModelCard", type("Card", (ModelCard,), {"load": staticmethod(load)}))
    if way == "push_to_hub":
        model.push_to_hub("me/model")
    else:
        folder.mkdir()
        if there is not None:
            (folder / "README.md").write_text(there)
        model.save_pretrained(folder, push_to_hub=True, repo_id="me/model")
    assert site.files.keys() >= {"README.md", "modeling_ssmax.py", "mlx_ssmax.py", "config.json", "model.safetensors"}
    assert "class Scale" in site.files["modeling_ssmax.py"]
    assert ("# Of the user" in site.files["README.md"]) == (there is not None)
    assert ("Scalable-Softmax" in site.files["README.md"]) == (there is None)
