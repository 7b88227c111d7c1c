"""ssmax convert, calibrate and inspect on real folders."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from faults import PATIENCE, Forks
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ssmax
import ssmax.hf
from ssmax.hf.loading import load_config

SSMAX = str(Path(sys.executable).with_name("ssmax"))
TOKENS = torch.arange(3, 13)[None]


@pytest.fixture(scope="module", autouse=True)
def forks(tmp_path_factory):
    """Commands are real processes, forked from one that has loaded torch and transformers once."""
    run.forks = Forks(tmp_path_factory.mktemp("forks"))
    yield
    run.forks.close()


def run(*arguments):
    return run.forks.completed(*arguments)


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    return tmp_path


def test_convert_and_inspect(folder):
    done = run("convert", folder / "plain", folder / "new", "--init", "0.5", "--layers", "1")
    assert done.returncode == 0, done.stderr
    assert "0.5000 0.5000 0.5000 0.5000" in done.stdout
    assert (folder / "new" / "tokenizer.json").exists()
    want = ssmax.convert(AutoModelForCausalLM.from_pretrained(folder / "plain"), 0.5, layers=[1])(TOKENS).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder / "new")(TOKENS).logits, want)
    told = run("inspect", folder / "new")
    assert told.returncode == 0
    assert "law s log n, init 0.5" in told.stdout
    assert "softmax" in told.stdout.splitlines()[-2]
    assert "not converted" in run("inspect", folder / "plain").stdout


def test_layers_that_have_no_index_are_shown_by_name(folder):
    tiny_model("biogpt").save_pretrained(folder / "biogpt")
    done = run("convert", folder / "biogpt", folder / "new", "--init", "0.5")
    assert done.returncode == 0, done.stderr
    told = run("inspect", folder / "new", "--figure", folder / "s.png")
    assert told.returncode == 0, told.stderr
    assert done.stdout.splitlines()[:-1] == told.stdout.splitlines()[:-1]
    some = run("convert", folder / "biogpt", folder / "some", "--layers", "layers.1.self_attn")
    assert "softmax" in some.stdout.splitlines()[3], some.stderr
    by_index = run("convert", folder / "biogpt", folder / "not", "--layers", "1")
    assert "its layers have names: layers.0.self_attn, layers.1.self_attn" in by_index.stderr
    assert [line.split()[0] for line in told.stdout.splitlines()[3:5]] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert "2 attention layers that can carry SSMax" in run("inspect", folder / "biogpt").stdout


def test_a_models_name_is_text_and_no_formula(folder):
    name = r"$\frac{<script>$_^"
    ssmax.convert(tiny_model("llama")).save_pretrained(folder / name)
    drawn = run("inspect", folder / name, "--figure", folder / "s.svg")
    assert drawn.returncode == 0, drawn.stderr
    assert "<script" not in (folder / "s.svg").read_text()


def test_a_dry_run_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    done = run("convert", folder / "plain", folder / "new", "--dry-run")
    assert done.returncode == 0
    assert "nothing was written" in done.stdout
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("plain", ["--init", "paper"], "init must be"),
        ("plain", ["--layers", "7"], "layers must be some of [0, 1]"),
        ("nothing", [], "cannot be loaded"),
        ("empty", [], "cannot be loaded"),
        ("damaged", [], "cannot be loaded"),
        ("wider", [], "lacks weights that its config.json asks for: lm_head.weight of shape (198, 32), not (99, 32)"),
        ("converted", [], "converted already"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(folder, source, options, words):
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    shutil.copytree(folder / "plain", folder / "wider")
    config = json.loads((folder / "wider" / "config.json").read_text())
    (folder / "wider" / "config.json").write_text(json.dumps(config | {"vocab_size": 2 * config["vocab_size"]}))
    ssmax.convert(tiny_model("llama")).save_pretrained(folder / "converted")
    before = sorted(folder.iterdir())
    done = run("convert", folder / source, folder / "new", *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert sorted(folder.iterdir()) == before


@pytest.fixture
def broken(folder):
    """A model with a config, a tokenizer and weights that cannot be loaded."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "plain")
    (folder / "plain" / "model.safetensors").write_bytes(b"no weights")
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "plain", "file/new"], "not a directory"),
        (["calibrate", "plain", "file/new"], "not a directory"),
        (["calibrate", "plain", "new", "--texts", "nowhere.txt"], "does not exist"),
        (["calibrate", "plain", "new", "--texts", "short.txt"], "fewer than two pieces"),
        (["inspect", "plain", "--figure", "file/s.png"], "not a directory"),
        (["inspect", "plain", "--figure", "folder.png"], "it is a folder"),
        (["demo", "--out", "folder.png"], "it is a folder"),
        (["convert", "plain", "dangling"], "exists already; give a new file"),
        (["export", "gguf", "plain", "file/new.gguf"], "not a directory"),
        (["convert", "plain", "new"], "cannot be loaded"),
    ],
)
def test_destination_and_texts_are_checked_before_the_weights_are_read(broken, arguments, words):
    (broken / "file").touch()
    (broken / "folder.png").mkdir()
    (broken / "dangling").symlink_to(broken / "nowhere at all")
    (broken / "short.txt").write_text("a few words")
    paths = ("plain", "new", "file/", "folder", "dangling", "nowhere", "short")
    one_line(run(*(broken / x if x.startswith(paths) else x for x in arguments)), 2, words)


@pytest.mark.parametrize("source", ["plian", "folder/plian", "org/plian", "runs/mine/model"])
def test_a_mistyped_path_is_said_at_once(folder, source, monkeypatch):
    (folder / "folder").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with pytest.raises(ValueError, match=f"{source} cannot be loaded.* there is no such folder"):
        load_config(source)


def unreachable(host, *more):
    """As where there is no network."""
    raise OSError("no network")


@pytest.mark.parametrize("command", ["convert", "calibrate"])
def test_a_target_that_exists_is_never_overwritten(folder, command):
    done = run(command, folder / "plain", folder / "plain")
    assert done.returncode == 2
    assert "exists already" in done.stderr


def test_laws_that_learn_something(folder):
    done = run("convert", folder / "plain", folder / "new", "--law", "ssmax-power", "--law-parameters", "gamma", "0.5")
    assert done.returncode == 0, done.stderr
    assert "law ssmax-power, s " in done.stdout
    told = run("inspect", folder / "new").stdout
    assert "s of each head / gamma of each head" in told
    assert told.count(" / 0.5000 0.5000") == 2
    done = run(
        "convert", folder / "plain", folder / "aware", "--law", "query-aware", "--law-parameters", "hidden_size", "4"
    )
    assert done.returncode == 0, done.stderr
    assert run("inspect", folder / "aware").stdout.count("QueryAwareScale(query-aware: ") == 2
    one_line(run("inspect", folder / "aware", "--figure", folder / "s.svg"), 2, "nothing to draw")


def test_a_law_that_learns_nothing(folder):
    done = run("convert", folder / "plain", folder / "new", "--law", "yarn", "--law-parameters", "factor", "4")
    assert done.returncode == 0, done.stderr
    assert "law yarn, factor 4" in done.stdout
    assert "yarn: (0.1 log(factor) + 1)^2" in run("inspect", folder / "new").stdout
    for arguments, words in (
        (["--law", "yarn"], "factor is missing"),
        (["--law", "olmo"], "law must be ssmax, ssmax-fixed"),
        (["--law", "qwen-1", "--init", "identity"], "learns nothing"),
        (["--law-parameters", "factor", "4"], "not law_parameters"),
    ):
        one_line(run("convert", folder / "plain", folder / "other", *arguments), 2, words)


def one_line(done, status, words):
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "it",
    "sleeps",
    "under",
    "some",
    "old",
    "tree",
]


@pytest.fixture(scope="module")
def copier(tmp_path_factory):
    """A model that copies, blunted, with a tokenizer of whole words, and texts to copy."""
    generator, folder = random.Random(0), tmp_path_factory.mktemp("copier")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "plain")

    def text():
        half = generator.choices(WORDS, k=32)
        return " ".join(half + half)

    torch.manual_seed(0)
    model = tiny_model("llama", hidden_size=64, initializer_range=0.05, max_position_embeddings=64, vocab_size=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        tokens = torch.tensor([tokenizer.encode(text()).ids for _ in range(16)])
        optimizer.zero_grad()
        cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight /= 3
    model.save_pretrained(folder / "plain")
    (folder / "texts").mkdir()
    for i in range(12):
        (folder / "texts" / f"{i}.txt").write_text(text())
    return folder


@pytest.fixture
def trained(copier, tmp_path):
    return Path(shutil.copytree(copier, tmp_path, dirs_exist_ok=True))


def test_calibrate(trained):
    options = ("--texts", trained / "texts", "--steps", "8", "--inits", "identity", "--learning-rate", "0.05")
    would = run("calibrate", trained / "plain", trained / "new", *options, "--dry-run")
    assert would.returncode == 0, would.stderr
    assert "fit s and b 1 time in 8 steps of 64 tokens, on 12 texts with 12 such pieces" in would.stdout
    assert not (trained / "new").exists()
    done = run("calibrate", trained / "plain", trained / "new", *options, "--theta-factor", "2", "--checkpointing")
    assert done.returncode == 0, done.stderr
    assert "kept: init identity" in done.stdout
    found = json.loads((trained / "new" / "calibration.json").read_text())
    assert found["mean_after"] < found["mean_before"] - 0.1
    model = AutoModelForCausalLM.from_pretrained(trained / "new")
    plain = AutoModelForCausalLM.from_pretrained(trained / "plain")
    assert model.config.rope_parameters["rope_theta"] == 2 * plain.config.rope_parameters["rope_theta"]
    assert model.config.ssmax["calibrated_at"] == 64
    assert (trained / "new" / "tokenizer.json").exists()
    card = (trained / "new" / "README.md").read_text()
    assert f"| all | {found['mean_before']:.4f} | {found['mean_after']:.4f} |" in card
    drawn = run("inspect", trained / "new", "--figure", trained / "s.png")
    assert drawn.returncode == 0, drawn.stderr
    assert (trained / "s.png").read_bytes().startswith(b"\x89PNG")
    one_line(run("inspect", trained / "plain", "--figure", trained / "s.png"), 2, "nothing to draw")
    one_line(run("inspect", trained / "new", "--figure", trained / "s.pdf"), 2, ".png or .svg")


def test_a_calibration_without_gain_writes_nothing(trained):
    noise = random.Random(1)
    (trained / "noise.txt").write_text(" ".join(noise.choices(WORDS, k=64 * 8)))
    options = ("--texts", trained / "noise.txt", "--steps", "1", "--inits", "matched", "--learning-rate", "1e-9")
    done = run("calibrate", trained / "plain", trained / "new", *options)
    assert done.returncode == 0, done.stderr
    assert "nothing has changed" in done.stdout
    assert "was not written" in done.stdout
    assert sorted(path.name for path in trained.iterdir()) == ["noise.txt", "plain", "texts"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_calibration_says_so_and_leaves_nothing(trained, number):
    arguments = ("calibrate", trained / "plain", trained / "new", "--texts", trained / "texts", "--steps", "100000")
    process = subprocess.Popen(
        [SSMAX, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    before = sorted(trained.rglob("*"))
    while not catches_sigterm(process.pid):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert told.strip().splitlines()[-1] == f"ssmax: stopped by {number.name}; nothing was written"
    assert "Traceback" not in told
    assert sorted(trained.rglob("*")) == before


def catches_sigterm(pid):
    """As the kernel knows it."""
    caught = int(Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--texts", "nowhere.txt"], "does not exist"),
        (["--length", "3"], "at least 16 tokens"),
        (["--texts", "short.txt"], "fewer than two pieces of 64 tokens"),
        (["--texts", "long.txt", "--inits", "paper"], "init must be"),
        (["--texts", "long.txt", "--steps", "0"], "steps must be at least 1"),
        (["--texts", "long.txt", "--theta-factor", "-1"], "--theta-factor must be positive and finite, got -1"),
        (["--texts", "long.txt", "--theta-factor", "inf"], "--theta-factor must be positive and finite, got inf"),
        (["--texts", "long.txt", "--length", "64", "--seed", str(2**70)], "seed must be a non-negative integer"),
        (["--texts", "long.txt", "--layers", "9"], "layers must be some of"),
    ],
)
def test_bad_calibrations_are_one_line_and_write_nothing(trained, options, words):
    (trained / "short.txt").write_text("the quick brown")
    (trained / "long.txt").write_text(" ".join(WORDS * 20))
    before = sorted(trained.rglob("*"))
    options = [trained / word if word.endswith(".txt") else word for word in options]
    one_line(run("calibrate", trained / "plain", trained / "new", *options), 2, words)
    assert sorted(trained.rglob("*")) == before


def test_a_full_disk_leaves_nothing(folder):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        one_line(run("convert", folder / "plain", disk / "new"), 1, "o space left")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
