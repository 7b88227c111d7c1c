import random

import numpy as np
import pytest
import torch

from ssmax.errors import RunFailed, UserError
from ssmax.lab import corpus, training
from ssmax.lab.experiments import needle_task
from ssmax.lab.recipes import smoke

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
]


def text(seed, words):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        (root / f"{i:02}.txt").write_text(text(i, 600))
    (root / "picture.bin").write_bytes(b"\xff\xfe\x00\x81" * 99)
    return root


@pytest.fixture(scope="module")
def loaded(folder):
    tokens, _ = corpus.prepare(
        str(folder), limit_bytes=10**9, vocab_size=300, held_out=(3, 200), cache=folder.parent / "cache"
    )
    return corpus.load(tokens)


def test_held_out_texts_are_not_trained_on(loaded, folder):
    held = [loaded.tokenizer.decode(row.tolist()) for row in loaded.held_out]
    train = loaded.tokenizer.decode(loaded.train.tolist())
    everything = "".join(path.read_text() for path in folder.glob("*.txt"))
    assert loaded.held_out.shape == (3, 200)
    assert all(piece[:80] in everything and piece[:80] not in train for piece in held)
    assert len(train) > 0.7 * len(everything)


def test_documents_are_separated_and_digits_are_tokens(loaded):
    end = loaded.tokenizer.encode(corpus.END_OF_TEXT).ids
    assert len(end) == 1
    assert (loaded.train == end[0]).sum() >= 50
    assert loaded.train[0] == end[0]
    assert loaded.tokenizer.encode("The special magic Tokyo number is: 48").tokens == [
        "The", " special", " magic", " Tokyo", " number", " is:", " 4", "8",
    ]  # fmt: skip


def test_the_cache_is_used_and_follows_the_text(folder, tmp_path):
    options = {"limit_bytes": 10**9, "vocab_size": 280, "held_out": (3, 200), "cache": tmp_path}
    first, name = corpus.prepare(str(folder), **options)
    stamp = (first / "tokens.safetensors").stat().st_mtime_ns
    assert corpus.prepare(str(folder), **options) == (first, name)
    assert (first / "tokens.safetensors").stat().st_mtime_ns == stamp
    assert corpus.prepare(str(folder), **options | {"vocab_size": 290})[0] != first
    other = tmp_path / "other"
    other.mkdir()
    (other / "one.txt").write_text(text(99, 3000))
    assert corpus.prepare(str(other), **options)[0] != first
    assert not list(tmp_path.glob(".*"))


def test_one_file_is_cut_into_training_and_held_out_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(text(5, 5000))
    tokens, name = corpus.prepare(
        str(path), limit_bytes=10**9, vocab_size=280, held_out=(8, 300), cache=tmp_path / "cache"
    )
    assert name == "book.txt"
    assert len(corpus.load(tokens).held_out) >= 1


def test_a_local_data_set_is_read_like_one_on_a_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pages = [{"text": text(i, 300)} for i in range(3)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: iter(pages))
    texts, name = corpus.documents("org/name", 10**9)
    assert texts == [page["text"] for page in pages]
    assert name == "org/name"


@pytest.mark.parametrize(
    ("content", "words"), [(None, "does not exist"), ("", "holds no text"), ("too short", "too short")]
)
def test_bad_corpora(tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        corpus.prepare(str(path), limit_bytes=10**9, vocab_size=280, held_out=(2, 300), cache=tmp_path / "cache")


def test_windows_follow_the_seed_alone_and_repeat_only_after_all():
    tokens = np.arange(100, dtype=np.int32)
    first, again, other = (training.Windows(tokens, 10, 25, seed) for seed in (1, 1, 2))
    assert [w["input_ids"][0].item() for w in first] == [w["input_ids"][0].item() for w in again]
    assert first.order.tolist() != other.order.tolist()
    assert sorted(first.order[:10]) == list(range(10))
    assert first[0]["input_ids"].tolist() == list(range(int(first.order[0]) * 10, int(first.order[0]) * 10 + 10))
    with pytest.raises(UserError, match="less than one window"):
        training.Windows(tokens, 101, 1, 0)


def test_examples_stay_within_the_training_length_and_batches_have_one_length(loaded):
    recipe = smoke()
    examples = training.Examples(needle_task(loaded, recipe, loaded.train), recipe, seed=4)
    sizes = [len(examples[i]["input_ids"]) for i in range(len(examples))]
    batches = np.array(sizes).reshape(recipe.finetune_steps, recipe.finetune_batch_size)
    assert (batches == batches[:, :1]).all()
    assert batches.max() <= recipe.train_length
    assert len(set(batches[:, 0])) > 3
    item = examples[7]
    answer = item["input_ids"][item["labels"] != -100].tolist()
    assert len(answer) == recipe.needle_digits
    assert torch.equal(item["input_ids"][-len(answer) :], torch.tensor(answer))
    assert torch.equal(examples[7]["input_ids"], examples[7]["input_ids"])


@pytest.mark.parametrize("form", ["paper", "qk-norm"])
def test_variants_of_a_seed_share_their_weights(form):
    a, b = (training.build_model(smoke(), form, variant, 3, 300) for variant in "ab")
    other = training.build_model(smoke(), form, "a", 4, 300)
    mine, theirs = a.state_dict(), b.state_dict()
    assert {name for name in theirs if name not in mine} == {
        f"model.layers.{i}.self_attn.ssmax.weight" for i in range(2)
    }
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not torch.equal(mine["lm_head.weight"], other.state_dict()["lm_head.weight"])


def test_the_paper_size_has_the_papers_parameters():
    recipe = smoke().__class__(
        name="paper", hidden_size=768, num_layers=12, num_heads=12, intermediate_size=2048, train_length=1024
    )
    with torch.device("meta"):
        model = training.build_model(recipe, "paper", "b", 0, 50_257)
    scales = sum(p.numel() for name, p in model.named_parameters() if ".ssmax." in name)
    norms = 25 * 768  # the paper's count leaves them out
    assert scales == 144
    assert sum(p.numel() for p in model.parameters()) == 162_129_408 + scales + norms


def test_a_loss_that_is_not_finite_stops_the_run(loaded, tmp_path):
    import dataclasses

    recipe = dataclasses.replace(smoke(), learning_rate=1e30, warmup_steps=1)
    model = training.build_model(recipe, "paper", "a", 0, loaded.tokenizer.get_vocab_size())
    with pytest.raises(RunFailed, match=r"training loss became .* lower --learning-rate"):
        training.pretrain(model, recipe, loaded.train, 0, tmp_path, lambda tokens: None)
