"""Files that were cut, flipped, emptied or swapped: found, named, never loaded half; and files that were made to do harm."""

import dataclasses
import json
import os
import pickle
import shutil
from importlib import metadata

import pytest
import torch
from faults import make_corpus, values
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import ssmax
import ssmax.hf
from ssmax import cli
from ssmax.data import corpus
from ssmax.errors import Damaged, RunFailed, UserError
from ssmax.evaluation.tasks import NEEDLE_WORDS
from ssmax.hf.loading import load_model, load_tokenizer
from ssmax.paper import training
from ssmax.paper.building import build_model
from ssmax.paper.recipes import smoke
from ssmax.runs.files import check_destination, check_folder, rename_new, seal_folder, written_whole
from ssmax.runs.folder import RunFolder
from ssmax.runs.rows import Row, read_rows, write_rows
from ssmax.training import checkpoints

RECIPE = dataclasses.replace(
    smoke(), steps=12, checkpoint_steps=4, hidden_size=16, intermediate_size=24, batch_size=4, train_length=32
)
KINDS = ("truncated", "flipped", "emptied", "removed")
# Whatever other libraries warn of is not the matter here.
pytestmark = pytest.mark.filterwarnings("ignore")


def damage(path, kind):
    content = path.read_bytes()
    if kind == "removed":
        path.unlink()
    elif kind == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if kind == "truncated" else b"")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    folder, _ = corpus.prepare(
        str(make_corpus(root / "text", 12)),
        limit_bytes=10**6,
        vocab_size=280,
        held_out=(2, 60),
        cache=root / "cache",
        words=NEEDLE_WORDS,
    )
    return corpus.load(folder)


def pretrain(tokens, folder, variant="b"):
    model = build_model(RECIPE, "paper", variant, 0, tokens.tokenizer.get_vocab_size())
    return training.pretrain(model, RECIPE, tokens.train, 0, folder / "pretrain-checkpoints", lambda n: None)


@pytest.fixture(scope="module")
def pretrained(tokens, tmp_path_factory):
    """Checkpoints of steps 8 and 12 and a saved model, of two models."""
    root = tmp_path_factory.mktemp("models")
    for variant in "ac":
        folder = root / f"paper-{variant}-0"
        training.save_stage(pretrain(tokens, folder, variant).model, folder / "pretrained", RECIPE)
    return root


@pytest.fixture
def models(pretrained, tmp_path):
    return shutil.copytree(pretrained, tmp_path / "models")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_continued(kind, models, capsys, record):
    folder = models / "paper-a-0" / "pretrain-checkpoints"
    whose = checkpoints.owner(folder, RECIPE)
    assert checkpoints.newest(folder, whose).name == "checkpoint-12"
    files = sorted(path.name for path in (folder / "checkpoint-12").iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "loss-0.json"} <= set(files)
    for name in files:
        other = shutil.copytree(folder, models / "paper-a-0" / kind / name / folder.name)
        damage(other / "checkpoint-12" / name, kind)
        assert checkpoints.newest(other, whose) == other / "checkpoint-8"
        told = capsys.readouterr().err
        assert (name in told) == ((name, kind) != ("seal.json", "removed"))  # a kill leaves one without a seal
    record(f"a file of a checkpoint {kind}", len(files))


def test_a_checkpoint_of_another_model_is_not_continued(models, capsys, record):
    mine, other = (models / f"paper-{v}-0" / "pretrain-checkpoints" for v in "ac")
    shutil.rmtree(mine / "checkpoint-12")
    shutil.copytree(other / "checkpoint-12", mine / "checkpoint-12")
    assert checkpoints.newest(mine, checkpoints.owner(mine, RECIPE)) == mine / "checkpoint-8"
    assert "checkpoint-12 belongs to paper-c-0" in capsys.readouterr().err
    another = dataclasses.replace(RECIPE, learning_rate=1.0)
    assert checkpoints.newest(other, checkpoints.owner(other, another)) is None
    record("checkpoints swapped between models", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_model_of_a_run_is_never_loaded(kind, models, record):
    good = models / "paper-a-0" / "pretrained"
    assert training.load_stage(good, RECIPE) is not None
    files = sorted(path.name for path in good.iterdir())
    assert {"model.safetensors", "config.json", "seal.json"} <= set(files)
    kept = shutil.copytree(good, models / "kept")
    for name in files:
        shutil.rmtree(good)
        shutil.copytree(kept, good)
        damage(good / name, kind)
        with pytest.raises(UserError, match=rf"{name}.*delete models/paper-a-0 and stages/paper-a-0"):
            training.load_stage(good, RECIPE)
    record(f"a file of a saved model {kind}", len(files))


def test_a_model_of_another_name_is_never_loaded(models, record):
    shutil.rmtree(models / "paper-a-0" / "pretrained")
    shutil.copytree(models / "paper-c-0" / "pretrained", models / "paper-a-0" / "pretrained")
    with pytest.raises(UserError, match="belongs to paper-c-0 pretrained"):
        training.load_stage(models / "paper-a-0" / "pretrained", RECIPE)
    record("saved models swapped", 1)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_damaged_rows_are_named(kind, tmp_path, record):
    rows = [Row("train_loss", "a", 0, {"step": step}, step / 7, 1) for step in range(9)]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows, checked=True)
    assert read_rows(path) == rows
    damage(path, kind)
    with pytest.raises(Damaged, match=r"rows\.jsonl is damaged"):
        read_rows(path)
    write_rows(path, rows, checked=True)
    assert read_rows(path) == rows
    record(f"a file of rows {kind}", 1)


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[1]", b"{}", b'{"metric": "a"}', b"null", b'"a"', b"{" * 5000]
)  # fmt: skip
def test_what_is_no_row_is_named_without_a_checksum_too(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [Row("train_loss", "a", 0, {"step": 1}, 1.0, 1)])
    good = path.read_bytes()
    for bad in (line, good.replace(b"1.0", b"NaN"), good.replace(b"1.0", b'"1"'), good.replace(b'{"step": 1}', b"3")):
        path.write_bytes(good + bad + b"\n")
        with pytest.raises(Damaged, match=r"rows\.jsonl, line 2, is not a row"):
            read_rows(path)


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """A finished ssmax train, in this process."""
    root = tmp_path_factory.mktemp("run")
    make_corpus(root / "text", 12)
    assert train(root) == 0
    return root


def train(root):
    small = [f"--{name.replace('_', '-')}={getattr(RECIPE, name)}" for name in ("hidden_size", "intermediate_size")]
    small += [f"--{name.replace('_', '-')}={getattr(RECIPE, name)}" for name in ("batch_size", "train_length", "steps")]
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(root / "run"), "--recipe", "smoke", *small, "--corpus", str(root / "text")])
    return end.value.code


@pytest.fixture
def root(run_once, tmp_path, monkeypatch):
    """Copied to the same relative place, since the corpus's path belongs to the configuration."""
    shutil.copytree(run_once, tmp_path / "root")
    recipe = tmp_path / "root" / "run" / "recipe.json"
    recipe.write_text(recipe.read_text().replace(str(run_once), str(tmp_path / "root")))
    return tmp_path / "root"


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_rows_file_of_a_run_is_made_anew_from_its_stages(kind, root, run_once):
    damage(root / "run" / "rows.jsonl", kind)
    assert train(root) == 0
    assert values(root / "run" / "rows.jsonl") == values(run_once / "run" / "rows.jsonl")


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("name", ["recipe.json", "stages/paper-b-0.pretrain.jsonl"])
def test_a_damaged_file_of_a_run_is_one_line_and_changes_nothing(name, kind, root, capsys, record):
    damage(root / "run" / name, kind)
    kept = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(root) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("ssmax: ")
    assert name in last or "another configuration" in last
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"} == kept
    record(f"{name} of a run {kind}", 1)


def test_the_published_model_is_sealed(root):
    check_folder(root / "run" / "model")


def test_a_hubs_files_and_an_edited_card_are_no_damage(root):
    model = shutil.copytree(root / "run" / "model", root / "from a hub")
    (model / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (model / ".cache" / "huggingface").mkdir(parents=True)
    (model / ".cache" / "huggingface" / "README.md.metadata").write_text("1\n")
    (model / "README.md").write_text("my own words\n")
    check_folder(model)
    (model / "README.md").unlink()
    check_folder(model)
    (model / "more.safetensors").write_bytes(b"")
    with pytest.raises(Damaged, match=r"more\.safetensors is not listed"):
        check_folder(model)


def test_a_missing_checksum_is_written_again(tmp_path):
    rows = [Row("loss", "a", 0, {}, 1.0, 1)]
    write_rows(tmp_path / "rows.jsonl", rows, checked=True)
    sums = tmp_path / "rows.jsonl.sha256"
    before = sums.read_bytes()
    sums.unlink()
    write_rows(tmp_path / "rows.jsonl", rows, checked=True)
    assert sums.read_bytes() == before


def test_another_version_is_said_before_anything_is_written(root, capsys, record):
    recipe = root / "run" / "recipe.json"
    settings = json.loads(recipe.read_text())
    assert set(settings["versions"]) == {"ssmax", "torch", "transformers"}
    settings["versions"]["torch"] = "2.0.1"
    recipe.write_text(json.dumps(settings))
    assert RunFolder(root / "run", smoke(), None).rows_file.exists()
    assert train(root) == 0  # finished: nothing is mixed
    (root / "run" / "stages" / "formula.jsonl").unlink(missing_ok=True)
    (root / "run" / "rows.jsonl").unlink()
    kept = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    capsys.readouterr()
    assert train(root) == 2
    told = capsys.readouterr().err
    assert f"was begun with torch 2.0.1, this is {metadata.version('torch')}" in told
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"} == kept
    record("a run that another version began", 1)


# ---- models from elsewhere ----


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    assert (tmp_path / "plain" / "model.safetensors.index.json").exists()
    return tmp_path / "plain"


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_model_from_elsewhere_is_refused(kind, folder, record):
    """No seal: what the structure shows is found; a flipped bit within a weight it cannot show."""
    names = ["config.json", "model.safetensors.index.json", *(p.name for p in folder.glob("*.safetensors"))]
    names = ["config.json"] if kind == "flipped" else names
    for name in names:
        bad = shutil.copytree(folder, folder.with_name(f"{kind}-{name}"))
        damage(bad / name, kind)
        if kind == "flipped":  # a quote, so that the structure shows it
            (bad / name).write_bytes((folder / name).read_bytes().replace(b'"', b"#", 1))
        with pytest.raises(ValueError, match=bad.name):
            load_model(bad)
    record(f"a file of a received model {kind}", len(names))


def test_a_missing_or_foreign_weight_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(first)
    lost = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != lost}, first, metadata={"format": "pt"})
    del content["weight_map"][lost]
    index.write_text(json.dumps(content))
    with pytest.raises(Damaged, match=f"lacks weights .*{lost}"):
        load_model(folder)
    save_file({**weights, lost: torch.ones(3)}, first, metadata={"format": "pt"})
    content["weight_map"][lost] = first.name
    index.write_text(json.dumps(content))
    with pytest.raises(Damaged, match=r"plain"):
        load_model(folder)


class Harm:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_loaded(tmp_path, models, tokens, capsys, record):
    model = tiny_model("llama")
    for name in ("plain", "converted"):
        if name == "converted":
            ssmax.convert(model)
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
        with pytest.raises(Damaged, match="safetensors"):
            load_model(tmp_path / name)
    with pytest.raises((OSError, ValueError), match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    # A checkpoint whose sender has sealed it anew: torch reads its optimizer with weights_only.
    folder = models / "paper-a-0" / "pretrain-checkpoints"
    whose = checkpoints.owner(folder, RECIPE)
    for name in ("optimizer.pt", "scheduler.pt"):
        shutil.rmtree(folder / "checkpoint-12", ignore_errors=True)
        shutil.copytree(folder / "checkpoint-8", models / "kept", dirs_exist_ok=True)
        torch.save(Harm(tmp_path / "harm"), folder / "checkpoint-8" / name)
        seal_folder(folder / "checkpoint-8", whose)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            pretrain(tokens, models / "paper-a-0", "a")
        shutil.rmtree(folder / "checkpoint-8")
        shutil.copytree(models / "kept", folder / "checkpoint-8")
    assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(Harm(tmp_path / "harm")))  # it would have
    assert (tmp_path / "harm").exists()
    record("a pickle that runs code in a received model or checkpoint", 5)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "..\\outside"]
)
def test_an_index_cannot_name_files_outside_of_its_folder(name, folder, record):
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder.parent / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    index.write_text(json.dumps(content))
    with pytest.raises(Damaged, match=r"outside of its folder"):
        load_model(folder)
    record("an index that names files outside of its folder", 1)


def test_a_models_own_code_is_never_run(tmp_path, record):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    harm = tmp_path / "harm"
    (tmp_path / "model" / "evil.py").write_text(f"import os\nos.mkdir({str(harm)!r})\n")
    path = tmp_path / "model" / "config.json"
    for model_type in ("llama", "evil"):
        config = json.loads(path.read_text())
        config["model_type"] = model_type
        config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
        path.write_text(json.dumps(config))
        if model_type == "llama":  # transformers' own class is taken
            load_model(tmp_path / "model")
        else:
            with pytest.raises(Damaged, match="contains custom code"):
                load_model(tmp_path / "model")
        with pytest.raises(Damaged):
            load_tokenizer(tmp_path / "model")
    assert not harm.exists()
    record("a model that brings code of its own", 4)


def test_a_config_cannot_write_code_into_the_saved_folder(tmp_path, record):
    model = ssmax.convert(tiny_model("llama"))
    model.config.auto_map = {"AutoModel": "x.y\nimport os; os.mkdir('harm')  #"}
    model.save_pretrained(tmp_path)
    code = (tmp_path / "modeling_ssmax.py").read_text()
    assert "harm" not in code
    assert "SSMaxLlamaForCausalLM" in code
    record("code in a received config's auto_map", 1)


@pytest.mark.parametrize(
    "recipe",
    [{}, [], "b", {"law": "s log n"}, {"law": "s log n", "layers": [7], "s": 1, "b": 0, "bias": False},
     {"law": "s log n", "layers": [0], "s": "x", "b": 0, "bias": False}, {"law": "os.system", "layers": [0], "parameters": {}},
     {"law": "yarn", "layers": [0], "parameters": {"factor": "x"}}, {"law": "yarn", "layers": [0], "parameters": 3}],
)  # fmt: skip
def test_a_damaged_recipe_in_a_saved_config_is_named(recipe, tmp_path):
    ssmax.convert(tiny_model("llama")).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ssmax": recipe}))
    with pytest.raises(ValueError, match=r"config\.ssmax"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


# ---- writing ----


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("old")

    def fail():
        with written_whole(tmp_path / "old") as temporary:
            (temporary / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "old" / "a").read_text() == "old"
    with written_whole(tmp_path / "old", "me") as temporary:
        (temporary / "b").write_text("new")
    check_folder(tmp_path / "old", "me")
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["old", "b", "seal.json"]
    (tmp_path / "old" / "c").touch()
    with pytest.raises(Damaged, match="c is not listed"):
        check_folder(tmp_path / "old")


@pytest.mark.parametrize("kind", ["folder", "file", "empty folder"])
def test_what_appears_in_the_meantime_is_not_replaced(tmp_path, kind):
    path = tmp_path / "new"

    def make():
        with written_whole(path, "me", new=True) as temporary:
            (temporary / "a").write_text("ours")
            path.write_text("theirs") if kind == "file" else path.mkdir()
            if kind == "folder":
                (path / "thesis").write_text("theirs")

    with pytest.raises(UserError, match="new was created by something else in the meantime and was not replaced"):
        make()
    assert [p.name for p in tmp_path.rglob("*")] == (["new", "thesis"] if kind == "folder" else ["new"])
    (tmp_path / "made").write_text("ours")
    with pytest.raises(UserError, match="was not replaced"):
        rename_new(tmp_path / "made", path)
    rename_new(tmp_path / "made", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "ours"


def test_nothing_is_written_into_a_finished_folder(tmp_path):
    with written_whole(tmp_path / "model", "me") as temporary:
        (temporary / "a").touch()
    with pytest.raises(UserError, match="model is a finished folder"):
        check_destination(tmp_path / "model" / "deep" / "inside", new=True)
    check_destination(tmp_path / "model" / ".." / "beside", new=True)


def test_a_folder_that_is_saved_again_is_not_damaged(tmp_path):
    ssmax.convert(tiny_model("llama")).save_pretrained(tmp_path / "first")
    seal_folder(tmp_path / "first", "model")
    model = load_model(tmp_path / "first")
    (tmp_path / "first" / "note.json").write_text("{}")
    with pytest.raises(
        Damaged, match=r"note.json is not listed; .* if you changed the folder on purpose, delete seal.json"
    ):
        load_model(tmp_path / "first")
    model.save_pretrained(tmp_path / "first")
    load_model(tmp_path / "first")


def test_weights_without_a_place_are_named(tmp_path):
    config = tiny_config("llama", num_labels=3, tie_word_embeddings=True)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tiny_model("llama").save_pretrained(tmp_path / "shorter")
    path = tmp_path / "shorter" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    for folder, name in (("classifier", "score.weight"), ("shorter", "model.layers.1.input_layernorm.weight")):
        with pytest.raises(Damaged, match=rf"holds weights that do not exist in LlamaForCausalLM, .*: {name}"):
            load_model(tmp_path / folder)


def test_buffers_of_older_versions_are_no_weights_without_a_place(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    older = {f"transformer.h.{i}.attn.{name}": torch.zeros(1) for i in range(2) for name in ("bias", "masked_bias")}
    save_file({**load_file(path), **older}, path, metadata={"format": "pt"})
    load_model(tmp_path)


def test_all_of_a_folder_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    """Read off the system calls themselves."""
    calls = []
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append((name, _path(a[0]))), real(*a))[1])
    with written_whole(tmp_path / "model", "me") as temporary:
        tiny_model("llama").save_pretrained(temporary)
    renamed = max(i for i, (name, path) in enumerate(calls) if name == "rename" or path.endswith(".tmp"))
    synced = {os.path.basename(path) for name, path in calls[:renamed] if name == "fsync"}
    assert {"model.safetensors", "config.json", "generation_config.json"} <= synced
    assert ("fsync", str(tmp_path)) in calls[renamed:]


def _path(x):
    return os.readlink(f"/proc/self/fd/{x}") if isinstance(x, int) else str(x)


# ---- numbers that are not finite ----


def spoil(module, step, batches=1):
    """Let a module give NaN from that step on."""
    count = 0

    def hook(module, inputs, output):
        nonlocal count
        count += 1
        return output * torch.nan if count > step - 1 else output

    module.register_forward_hook(hook)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "ssmax", "o_proj"])
def test_a_nan_is_found_at_once_with_step_and_layer(name, tokens, tmp_path, record):
    model = build_model(RECIPE, "paper", "b", 0, tokens.tokenizer.get_vocab_size())
    spoil(getattr(model.model.layers[1].self_attn, name), 7)
    scratch = tmp_path / "pretrain-checkpoints"
    with pytest.raises(
        RunFailed,
        match=rf"^step 7: the training loss became nan: the output of model\.layers\.1\.self_attn\.{name} was",
    ):
        training.pretrain(model, RECIPE, tokens.train, 0, scratch, lambda n: None)
    kept = checkpoints.newest(scratch, checkpoints.owner(scratch, RECIPE))
    assert kept.name == "checkpoint-4"
    assert all(x.isfinite().all() for x in load_file(kept / "model.safetensors").values())
    record("a NaN in q, k, v, the scale or an output", 1)


def test_a_nan_in_the_backward_alone_is_found(tokens, tmp_path):
    model = build_model(RECIPE, "paper", "b", 0, tokens.tokenizer.get_vocab_size())
    layer = model.model.layers[0].mlp
    layer.register_forward_hook(lambda m, i, o: o + (o.detach() - o).abs().sqrt())  # its slope at 0 is not finite
    with pytest.raises(
        RunFailed, match=r"^step 1: a gradient is not finite though the training loss is .*model\.layers\.0"
    ):
        training.pretrain(model, RECIPE, tokens.train, 0, tmp_path / "x", lambda n: None)


def test_a_weight_that_is_not_finite_is_named_and_never_saved(tokens, tmp_path, record):
    model = build_model(RECIPE, "paper", "b", 0, tokens.tokenizer.get_vocab_size())

    def poison(done):
        steps.append(done)
        if len(steps) == 9:  # the first call is the start
            with torch.no_grad():
                model.model.layers[1].self_attn.k_proj.weight[3, 3] = torch.inf

    steps = []
    scratch = tmp_path / "pretrain-checkpoints"
    with pytest.raises(RunFailed, match=r"step 8: weight model\.layers\.1\.self_attn\.k_proj\.weight is not finite"):
        training.pretrain(model, RECIPE, tokens.train, 0, scratch, poison)
    assert checkpoints.newest(scratch, checkpoints.owner(scratch, RECIPE)).name == "checkpoint-4"
    record("a weight that is not finite", 1)
