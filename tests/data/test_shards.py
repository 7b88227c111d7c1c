"""Data at size: sources, shards, kills and damage, with real tokenizers, data sets, processes and signals."""

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from faults import PATIENCE, wait_for
from huggingface_hub import constants
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ssmax.hf  # noqa: F401
from ssmax import cli
from ssmax.data import corpus, preparation
from ssmax.data.shards import HELD_OUT, Manifest, Shards, ShardWriter, check, token_type, verify
from ssmax.data.sources import Documents
from ssmax.data.tokenizer import load_given_tokenizer
from ssmax.errors import LeftOut, UserError
from ssmax.paper import reproduce
from ssmax.paper.plan import _data, plan
from ssmax.paper.recipes import paper, smoke
from ssmax.paper.stages import STAGES
from ssmax.paper.tasks import count_task, needle_task
from ssmax.paper.training import check_fit
from ssmax.runs.rows import read_rows

# datasets leaves files open that it did not read to the end.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)
END = "<|endoftext|>"
LENGTH = 100  # of held-out texts
WORDS = ["".join(random.Random(i).choices("abcdefgh", k=4)) for i in range(80)]


def text(seed, words):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words)) + f" {seed}.\n"


TEXTS = [text(i, 20 + 97 * i % 400) for i in range(300)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def tokenizer(root):
    """A byte-level tokenizer as GPT-2's: digits share tokens, and the end of text is not the first id."""
    made = ByteLevelBPETokenizer()
    numbers = (
        [f" {i}" for i in range(30)] * 2000
        + [f" {i}" for i in range(200)]
        + [f" {1234567 * i % 9999999:07}." for i in range(99)]
    )
    made.train_from_iterator([*TEXTS, *numbers * 3], vocab_size=420, show_progress=False)
    made.add_special_tokens([END])
    files = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END)
    files.save_pretrained(root / "tokenizer")
    return str(root / "tokenizer")


@pytest.fixture(scope="module")
def rows(root):
    """The same texts as a saved data set, and as folders of parquet, jsonl and csv files."""
    whole = datasets.Dataset.from_dict({"id": range(300), "text": TEXTS})
    datasets.DatasetDict({"train": whole, "test": whole.select(range(3))}).save_to_disk(
        root / "saved", num_shards={"train": 3, "test": 1}
    )
    for name in ("parquet", "json", "csv"):
        (root / name).mkdir()
        for i in range(3):
            part = whole.select(range(100 * i, 100 * i + 100))
            getattr(part, f"to_{name}")(root / name / f"{i}.{name}{'l' if name == 'json' else ''}")
    return root


def prepared(source, tokenizer, cache, tokens=10**6, shard_tokens=5000, wanted=5):
    folder = preparation.prepare_stream(
        str(source),
        tokenizer=tokenizer,
        tokens=tokens,
        held_out=(wanted, LENGTH),
        cache=cache,
        shard_tokens=shard_tokens,
    )
    return folder, corpus.load(folder)


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".bin", ".npy", ".json")}


@pytest.fixture(scope="module")
def whole(rows, tokenizer):
    return prepared(rows / "saved", tokenizer, rows / "cache")


def test_tokens_are_those_of_the_documents_in_order(whole, tokenizer):
    folder, loaded = whole
    core = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    end = core.token_to_id(END)
    assert end != 0
    want = [[end, *core.encode(t).ids] for t in TEXTS]
    long = [ids for ids in want if len(ids) >= LENGTH]
    held = {tuple(row) for row in loaded.held_out.tolist()}
    assert loaded.held_out.shape == (5, LENGTH)
    assert len(held) == 5
    assert held <= {tuple(ids[i : i + LENGTH]) for ids in long for i in range(0, len(ids), 4 * LENGTH)}
    got = loaded.train[:].tolist()
    kept = []
    for ids in want:
        gap = False
        for first in range(0, len(ids), 4 * LENGTH):
            section = ids[first : first + 4 * LENGTH]
            if tuple(section[:LENGTH]) in held:
                gap = True
                continue
            kept += [end] * gap + section
            gap = False
    assert got == kept
    manifest = check(folder)
    assert manifest.documents == 300
    assert manifest.bytes == sum(len(t.encode()) for t in TEXTS)
    assert manifest.tokens == len(got) == sum(shard["tokens"] for shard in manifest.shards)
    assert [shard["tokens"] for shard in manifest.shards[:-1]] == [5000] * (len(manifest.shards) - 1)
    assert manifest.tokenizer["name"] == tokenizer
    assert manifest.dtype == "<u2"


@pytest.mark.parametrize("kind", ["parquet", "json", "csv"])
def test_all_kinds_of_rows_give_the_same_shards(kind, whole, rows, tokenizer, tmp_path):
    folder, _ = prepared(rows / kind, tokenizer, tmp_path)
    assert check(folder).fingerprint == check(whole[0]).fingerprint


def test_slices_across_shards(whole):
    _, loaded = whole
    everything = np.concatenate([np.fromfile(loaded.train.folder / name, "<u2") for name in loaded.train.names])
    for at in [(0, 3), (4990, 5010), (4999, 15_001), (5000, 10_000), (len(everything) - 4, 10**9), (7, 7), (-5, None)]:
        assert np.array_equal(loaded.train[slice(*at)], everything[slice(*at)])
    assert len(loaded.train) == len(everything)


def test_no_copy_of_a_held_out_text_is_trained_on(tokenizer, tmp_path):
    with open(tmp_path / "twice.jsonl", "w") as file:
        for t in [*TEXTS, *TEXTS]:
            file.write(json.dumps({"content": t}) + "\n")
    _, loaded = prepared(tmp_path / "twice.jsonl", tokenizer, tmp_path / "cache", wanted=1000)
    assert 10 < len({tuple(row) for row in loaded.held_out.tolist()}) == len(loaded.held_out)
    train = loaded.tokenizer.decode(loaded.train[:].tolist())
    assert train.count(TEXTS[0][:60]) == 2
    assert not any(loaded.tokenizer.decode(row.tolist())[:200] in train for row in loaded.held_out)


def test_a_target_ends_the_stream_and_keeps_what_is_held_out(whole, rows, tokenizer, tmp_path):
    folder, loaded = prepared(rows / "saved", tokenizer, tmp_path, tokens=12_345)
    assert len(loaded.train) == 12_345
    assert np.array_equal(loaded.train[:], whole[1].train[:12_345])
    assert len(check(folder).shards) == 3
    folder, loaded = prepared(rows / "saved", tokenizer, tmp_path, tokens=50)
    assert len(loaded.train) == 50
    assert np.array_equal(loaded.held_out, whole[1].held_out)  # looked for beyond the training text


def test_what_was_left_out_stands_in_the_manifest_and_is_said_again(rows, tokenizer, tmp_path):
    shutil.copytree(rows / "json", tmp_path / "json")
    (tmp_path / "json" / "LICENSE").write_text("words")
    for _ in range(2):  # prepared, and found
        with pytest.warns(LeftOut, match=r"corpus 'json': left out files beside the rows: 1 \(LICENSE\)"):
            folder, _ = prepared(tmp_path / "json", tokenizer, tmp_path / "cache")
    assert check(folder).left_out == ["files beside the rows: 1 (LICENSE)"]


def test_a_large_text_file_passes_in_pieces(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(TEXTS))
    stream = Documents(str(path), piece=3000)
    pieces = list(stream)
    assert "".join(pieces) == "".join(TEXTS)
    assert all(len(piece) < 6000 and piece.endswith("\n") for piece in pieces)
    assert len(pieces) > 50
    for cut in (0, 1, 17, len(pieces)):
        first, again = Documents(str(path), piece=3000), Documents(str(path), piece=3000)
        iterator = iter(first)
        assert [next(iterator) for _ in range(cut)] == pieces[:cut]
        again.restore(json.loads(json.dumps(first.state())))
        assert list(again) == pieces[cut:]


KINDS = ["saved", "parquet", "json", "csv", "parquet=0.7,json=0.3"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_continues_where_it_stood(kind, rows, monkeypatch):
    monkeypatch.chdir(rows)
    everything = list(Documents(kind))
    for cut in (0, 1, 99, 100, 101, 250, len(everything)):
        first, again = Documents(kind), Documents(kind)
        iterator = iter(first)
        assert [next(iterator) for _ in range(cut)] == everything[:cut]
        again.restore(json.loads(json.dumps(first.state())))
        assert list(again) == everything[cut:]


def test_a_mixture_keeps_its_shares_all_along(rows, monkeypatch):
    monkeypatch.chdir(rows)
    (rows / "other.jsonl").write_text("".join(json.dumps({"body": "X" + t}) + "\n" for t in TEXTS))
    stream = Documents("saved=3,other.jsonl#body=1")
    read = [0, 0]
    for count, t in enumerate(stream):
        read[t.startswith("X")] += len(t)
        if count > 50:
            assert read[1] / sum(read) == pytest.approx(0.25, abs=0.05)
    assert read[0] == sum(map(len, TEXTS))  # it ends with the first source that does
    assert Documents("saved,other.jsonl").parts[1].weight == 1


PREPARE = """
import sys, time
from pathlib import Path
from ssmax.data import preparation
from ssmax.data import shards
preparation.BATCH_BYTES = 3000
finish = shards.ShardWriter.finish_shard
def slowly(self):
    finish(self)
    time.sleep(0.1)
shards.ShardWriter.finish_shard = slowly
preparation.prepare_stream(sys.argv[1], tokenizer=sys.argv[2], tokens=10**6, held_out=(5, 100), cache=Path(sys.argv[3]), shard_tokens=700)
"""


@pytest.mark.parametrize(("kind", "kills"), [("saved", [12]), ("parquet=0.7,json=0.3", [3, 20])])
def test_a_killed_preparation_ends_with_the_same_shards(kind, kills, rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(rows)
    monkeypatch.setattr(preparation, "BATCH_BYTES", 3000)
    want, _ = prepared(kind, tokenizer, tmp_path / "undisturbed", shard_tokens=700)
    cache = tmp_path / "killed"
    for shards in kills:
        process = subprocess.Popen(
            [sys.executable, "-c", PREPARE, kind, tokenizer, str(cache)], stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda shards=shards: list(cache.glob(f"*/train-{shards:05}.bin")), process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
        [folder] = cache.iterdir()
        with pytest.raises(UserError, match="no finished corpus"):
            corpus.load(folder)
    first = {p: p.stat().st_mtime_ns for p in folder.glob("train-*.bin")}
    kept = len(Manifest.read(folder).shards)
    again, _ = prepared(kind, tokenizer, cache, shard_tokens=700)
    assert again == folder
    assert content(again) == content(want)
    assert kept >= kills[-1]
    assert all(p.stat().st_mtime_ns == first[p] for p in sorted(first)[:kept])
    assert not list(folder.glob(".*.tmp"))


def test_a_finished_preparation_is_used_and_follows_its_source(rows, tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    first, _ = prepared(path, tokenizer, tmp_path / "cache")
    stamp = (first / "manifest.json").stat().st_mtime_ns
    assert prepared(path, tokenizer, tmp_path / "cache")[0] == first
    assert (first / "manifest.json").stat().st_mtime_ns == stamp
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in reversed(TEXTS)))
    assert prepared(path, tokenizer, tmp_path / "cache")[0] != first


@pytest.fixture
def damaged(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    verify(tmp_path / "copy")
    return tmp_path / "copy"


def test_damage_is_named(damaged):
    shard = damaged / "train-00002.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    with pytest.raises(UserError, match=r"train-00002\.bin has 9,998 bytes, not 10,000"):
        corpus.load(damaged)
    shard.write_bytes(good[:77] + bytes([good[77] ^ 1]) + good[78:])
    check(damaged)  # the quick look does not see it
    with pytest.raises(UserError, match=r"train-00002\.bin is not what the manifest says"):
        verify(damaged)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00002\.bin is missing"):
        corpus.load(damaged)
    (damaged / "train-00001.bin").rename(shard)
    shard.with_name("train-00001.bin").write_bytes(good)  # swapped
    with pytest.raises(UserError, match=r"train-00001\.bin is not what"):
        verify(damaged)


@pytest.mark.parametrize("name", [HELD_OUT, "tokenizer/tokenizer.json"])
def test_damage_beside_the_shards_is_named(name, damaged):
    (damaged / name).write_bytes(b"x" + (damaged / name).read_bytes()[1:])
    with pytest.raises(UserError, match=f"{name} is not what"):
        verify(damaged)
    (damaged / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        corpus.load(damaged)


def test_wide_vocabularies_take_wide_tokens(whole, tmp_path):
    assert [token_type(size) for size in (2**16, 2**16 + 1)] == ["<u2", "<u4"]
    manifest = Manifest("", {}, "<u4")
    writer = ShardWriter(tmp_path, manifest, 3)
    tokens = np.array([70_000, 1, 2, 99_999, 5])
    while len(tokens):
        tokens = tokens[writer.add(tokens) :]
        writer.finish_shard()
    assert Shards(tmp_path, manifest)[:].tolist() == [70_000, 1, 2, 99_999, 5]
    assert [shard["tokens"] for shard in manifest.shards] == [3, 2]


def command(capsys, *arguments):
    """Run the command line in this process, and return its status and what it printed."""
    capsys.readouterr()
    try:
        cli.main(list(map(str, arguments)))
    except SystemExit as status:
        return status.code or 0, capsys.readouterr()


def one_line(capsys, arguments, *words):
    status, printed = command(capsys, *arguments)
    assert status == 2, printed
    assert len(printed.err.strip().splitlines()) == 1, printed.err
    assert all(word in printed.err for word in words), printed.err


TRAIN = ["--recipe", "smoke", "--steps", "4", "--warmup-steps", "1"]


@pytest.fixture(scope="module")
def trained(rows, tokenizer):
    """A corpus prepared ahead, and a model trained on it without a word on the tokenizer."""
    recipe = dataclasses.replace(smoke(), steps=4, warmup_steps=1, tokenizer=tokenizer)
    folder, _ = reproduce.tokenise(recipe, str(rows / "saved"), rows / "ahead")
    assert check(folder).tokens == recipe.prepared_tokens == 4 * 8 * 64
    with pytest.raises(SystemExit) as status:
        cli.main(["train", str(rows / "run"), *TRAIN, "--corpus", str(folder)])
    assert not status.value.code
    return folder, rows / "run"


def test_a_model_is_trained_on_prepared_shards_and_published_with_its_tokenizer(trained, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(trained[1] / "model")
    published, given = (AutoTokenizer.from_pretrained(name) for name in (trained[1] / "model", tokenizer))
    assert published(TEXTS[3])["input_ids"] == given(TEXTS[3])["input_ids"]
    assert published.eos_token_id == given.eos_token_id == model.config.eos_token_id
    assert model.generation_config.eos_token_id == given.eos_token_id
    assert model.config.vocab_size == len(given)


def test_ranks_wait_for_one_preparation_and_train_as_one(trained, rows, tokenizer, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ssmax"]
    arguments = ["train", tmp_path / "run", *TRAIN, "--corpus", rows / "saved", "--tokenizer", tokenizer]
    done = subprocess.run([*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    [cached] = (tmp_path / "cache").iterdir()
    assert check(cached).fingerprint == check(trained[0]).fingerprint
    one, two = (read_rows(folder / "rows.jsonl") for folder in (trained[1], tmp_path / "run"))
    assert [row.value for row in two] == pytest.approx([row.value for row in one], abs=1e-5)


def test_needles_and_counts_with_digits_that_share_tokens(rows, tokenizer, tmp_path):
    recipe = dataclasses.replace(
        smoke(), models=("paper:a",), retrieval=("paper:a",), counting=("paper:a",), steps=2, finetune_steps=2, count_steps=2,
        needle_digits=4, train_length=256, length_factor=1, trials=12, tokenizer=tokenizer,
    )  # fmt: skip
    tokens, _ = reproduce.tokenise(recipe, str(rows / "json"), tmp_path / "cache")
    loaded = corpus.load(tokens)
    check_fit(recipe, loaded)
    with pytest.raises(UserError, match="a text to count in has up to"):
        check_fit(dataclasses.replace(recipe, train_length=128), loaded)
    metrics = set()
    for stage in recipe.stages(recipe.jobs[0]):
        metrics |= {row.metric for row in STAGES[stage].run(recipe.jobs[0], recipe, loaded, tmp_path, lambda n: None)}
    assert {"loss_by_position", "retrieval_accuracy", "top_needle_score", "counting_accuracy"} <= metrics
    task = needle_task(loaded, recipe, loaded.train)
    examples = [task.example(task.shortest, 0.5, np.random.default_rng(i)) for i in range(99)]
    assert len({len(example.answer) for example in examples}) > 1
    assert {len(example.prompt + example.answer) for example in examples} == {task.shortest}


def test_counting_needs_numbers_of_one_token(whole):
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UserError, match=r"more than one token of ' 0'.*empty --counting"):
        count_task(dataclasses.replace(whole[1], tokenizer=core), whole[1].train)


def test_a_prepared_folder_that_does_not_fit(trained, tmp_path, capsys):
    train = ["train", tmp_path / "run", *TRAIN, "--corpus", trained[0]]
    one_line(capsys, [*train, "--tokenizer", "gpt2"], "prepared with the tokenizer", "--tokenizer")
    one_line(capsys, [*train, "--length-factor", 8], "held-out texts of 257 tokens", "513")


def test_damage_ends_a_new_run_before_it_begins(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "copy")
    shard = tmp_path / "copy" / "train-00000.bin"
    shard.write_bytes(b"xx" + shard.read_bytes()[2:])
    train = ["train", tmp_path / "run", *TRAIN, "--corpus", tmp_path / "copy"]
    one_line(capsys, train, "train-00000.bin is not what the manifest says")
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_the_command_says_what_was_prepared(rows, tokenizer, tmp_path, capsys):
    small = ["--steps", 4, "--tokenizer", tokenizer, "--corpus", rows / "csv", "--cache", tmp_path]
    status, printed = command(capsys, "prepare", "smoke", *small)
    assert status == 0
    assert "csv: 300 documents, 2,048 training tokens in 1 shards, 4 held-out texts of 257 tokens" in printed.out
    assert Path(printed.out.rpartition("Corpus: ")[2].strip()).parent == tmp_path


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nobody/nothing", "could not be loaded as a data set"),
        ("{root}/saved=0.5,{root}/json", "weights to some sources only"),
        ("{root}/saved=0.5,{root}/json=-1", "positive number"),
        ("{root}/saved,,{root}/json", "not spelled"),
        ("{root}/saved#body", "no column 'body', but id, text"),
        ("{root}/nothing.parquet=1", "does not exist"),
        ("parquet", "does not exist"),
        ("{root}/short.txt", "too short: 1 documents"),
    ],
)
def test_bad_sources(source, words, rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (rows / "short.txt").write_text("a few words")
    with pytest.raises(UserError, match=words):
        prepared(source.format(root=rows), tokenizer, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_a_name_that_no_hub_answers_is_one_quick_line(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    asked = []
    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a[0]) or lookup(*a, **k))
    one_line(
        capsys,
        ["prepare", "paper", "--corpus", rows / "saved", "--cache", tmp_path],
        "--tokenizer gpt2",
        "tokenizer.json",
    )
    one_line(
        capsys, ["prepare", "smoke", "--corpus", "org/name", "--cache", tmp_path], "'org/name'", "could not be loaded"
    )
    assert 0 < len(asked) <= 4  # what asks again waits in between, longer each time
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["./gpt", "a/b/c", "tokenizer.json", "{here}/tokenizr", "two words"])
def test_a_tokenizer_that_can_only_be_a_path_is_said_at_once(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    with pytest.raises(UserError, match=r"does not exist; give a folder with a tokenizer\.json"):
        load_given_tokenizer(name.format(here="here"))


def test_a_tokenizer_without_an_end(tmp_path, rows):
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-text token"):
        prepared(rows / "saved", tmp_path / "tokenizer.json", tmp_path / "cache")


def test_the_plan_says_what_the_data_takes(tokenizer):
    line = next(line for line in plan(dataclasses.replace(smoke(), tokenizer=tokenizer)) if line.startswith("data"))
    assert "15,360 tokens" in line
    line = _data(paper(), 50_257)
    assert "419,430,400,000 tokens by the tokenizer gpt2, 1,563 shards of 512.0 MiB, 781.2 GiB on disk" in line
    assert "holds 1.5 GiB" in line
