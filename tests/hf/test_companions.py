"""What belongs to a model beside its weights is carried along, from a folder or the hub's cache; secrets and code are not."""

import os
import shutil

import pytest
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ssmax.hf.companions import copy_companions
from ssmax.hf.loading import load_tokenizer
from ssmax.model_folders import convert_folder
from ssmax.runs.files import check_folder

OPTIONS = {"dry_run": False, "init": "identity"}
NAMES = (
    *(
        "tekken.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "sentencepiece.bpe.model",
        "qwen.tiktoken",
    ),
    *(
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE",
        "assets/mel_filters.txt",
        "merges.txt",
    ),
)


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def make_model(folder):
    tiny_model("llama").save_pretrained(folder)
    core = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, "a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    write(folder, *NAMES)
    return folder


@pytest.fixture
def cache(tmp_path):
    """A hub's cache as huggingface_hub keeps it: a snapshot of links to blobs."""
    repo = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repo / "snapshots" / ("ab" * 20)
    made = make_model(tmp_path / "made")
    (repo / "blobs").mkdir(parents=True)
    for at, name in enumerate(sorted(names(made))):
        shutil.copyfile(made / name, repo / "blobs" / str(at))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(repo / "blobs" / str(at), (snapshot / name).parent))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("ab" * 20)
    return snapshot


@pytest.mark.parametrize("by", ["folder", "snapshot", "name"])
def test_a_converted_folder_has_all_that_the_source_has(by, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = {"folder": tmp_path / "made", "snapshot": cache, "name": "someone/tiny"}[by]
    if by == "name":  # transformers reads where the cache is when it is imported; the name is looked up by itself
        behind = copy_companions("someone/tiny", new_folder(tmp_path / "new"))
        assert behind is None
    else:
        lines = convert_folder(str(source), tmp_path / "new", **OPTIONS)
        assert not any("not copied" in line for line in lines)
        assert names(cache) <= names(tmp_path / "new")
        check_folder(tmp_path / "new", "model")
    for name in NAMES:
        assert (tmp_path / "new" / name).read_text() == f"content of {name}"
        assert not (tmp_path / "new" / name).is_symlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "made")("a")["input_ids"] == [0]


def new_folder(path):
    path.mkdir()
    return path


def test_what_is_not_copied_is_said_in_one_line(tmp_path):
    source = make_model(tmp_path / "made")
    secret = tmp_path / "secret.txt"
    secret.write_text("key")
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere", "more.txt")
    (source / "vocab.txt").symlink_to(secret)
    (source / "templates").symlink_to(tmp_path / "elsewhere")
    (source / "inside.txt").symlink_to(source / "LICENSE")
    (source / "lost.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe.txt")
    write(source, "tokenization_own.py", ".git/config", ".env", "checkpoint-7/state.json", "checkpoint-7/optimizer.pt")
    write(source, "pytorch_model.bin", "old.safetensors.index.json", "seal.txt", "deep/own.py")
    (target := new_folder(tmp_path / "new"))
    line = copy_companions(str(source), target)
    assert "\n" not in line
    for name in (
        "vocab.txt",
        "templates/",
        "lost.json",
        "pipe.txt",
        "tokenization_own.py",
        "checkpoint-7/",
        "deep/own.py",
    ):
        assert name in line
    assert names(target) == names(make_model(tmp_path / "again")) - {"model.safetensors"} | {"inside.txt", "seal.txt"}
    assert not [path for path in target.rglob("*") if path.is_symlink()]


def test_a_folder_that_plays_the_hubs_cache_cannot_lead_out_of_itself(tmp_path):
    """Blobs that are a link themselves: what they hold is not the model's."""
    write(tmp_path, "home/id_rsa")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").symlink_to(tmp_path / "home")
    (snapshot / "vocab.txt").symlink_to("../../blobs/id_rsa")
    (snapshot / "merges.txt").symlink_to("../../blobs/../refs")
    assert "vocab.txt" in copy_companions(str(snapshot), new_folder(tmp_path / "new"))
    assert names(tmp_path / "new") == set()


def test_what_is_written_anew_is_not_overwritten(tmp_path):
    source, target = make_model(tmp_path / "made"), new_folder(tmp_path / "new")
    write(target, "config.json", "calibration.json")
    write(source, "calibration.json", "seal.json")
    copy_companions(str(source), target)
    assert (target / "config.json").read_text() == "content of config.json"
    assert not (target / "seal.json").exists()


def test_a_name_that_is_nowhere_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "tokenizer and other files of nobody/nothing" in copy_companions("nobody/nothing", tmp_path)


def test_no_tokenizer_is_made_up_where_there_is_none(tmp_path):
    """transformers makes an empty one for some families."""
    tiny_model("qwen2").save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "source")
    copy_companions(str(tmp_path / "source"), new_folder(tmp_path / "new"))
    assert "tokenizer_config.json" not in names(tmp_path / "new")
