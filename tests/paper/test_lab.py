import dataclasses
import hashlib
import json
import math
import random
import subprocess

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import ssmax
from ssmax.data import corpus
from ssmax.data.sources import documents
from ssmax.data.tokenizer import END_OF_TEXT
from ssmax.errors import LeftOut, RunFailed, UserError
from ssmax.evaluation.tasks import NEEDLE_WORDS
from ssmax.paper import training
from ssmax.paper.building import SwitchedScale, build_model, set_switches, switch_at
from ssmax.paper.models import FORMS
from ssmax.paper.plan import plan
from ssmax.paper.recipes import LATER, PAPER_THETA, Job, Recipe, laptop, paper, small, smoke, tiny, turns
from ssmax.paper.stages import STAGES
from ssmax.paper.tasks import count_task, counted
from ssmax.runs import provenance
from ssmax.runs.folder import RunFolder
from ssmax.training import checkpoints, loop
from ssmax.training.datasets import Windows

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
    with pytest.warns(LeftOut, match=r"files that are binary: 1 \(picture.bin\)"):
        tokens, _ = corpus.prepare(
            str(folder),
            limit_bytes=10**9,
            vocab_size=300,
            held_out=(3, 200),
            cache=folder.parent / "cache",
            words=NEEDLE_WORDS,
        )
    return corpus.load(tokens)


def test_held_out_texts_are_not_trained_on(loaded, folder):
    held = [loaded.tokenizer.decode(row.tolist()) for row in loaded.held_out]
    train = loaded.tokenizer.decode(loaded.train[:].tolist())
    everything = "".join(path.read_text() for path in folder.glob("*.txt"))
    assert loaded.held_out.shape == (3, 200)
    assert all(piece[:80] in everything and piece[:80] not in train for piece in held)
    assert len(train) > 0.7 * len(everything)


def test_documents_are_separated_and_digits_are_tokens(loaded):
    end = loaded.encode(END_OF_TEXT)
    assert len(end) == 1
    assert end == [loaded.end]
    assert (loaded.train[:] == loaded.end).sum() >= 50
    assert loaded.train[:1].tolist() == end
    assert loaded.tokenizer.encode("The special magic Tokyo number is: 48").tokens == [
        "The", " special", " magic", " Tokyo", " number", " is:", " 4", "8",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::ssmax.errors.LeftOut")
def test_the_cache_is_used_and_follows_the_text(folder, tmp_path):
    options = {"limit_bytes": 10**9, "vocab_size": 280, "held_out": (3, 200), "cache": tmp_path}
    first, name = corpus.prepare(str(folder), **options)
    stamp = (first / "train-00000.bin").stat().st_mtime_ns
    assert corpus.prepare(str(folder), **options) == (first, name)
    assert (first / "train-00000.bin").stat().st_mtime_ns == stamp
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


def test_rows_on_disk_are_read_like_files(tmp_path):
    pages = [text(i, 300) for i in range(3)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps({"id": 1, "text": page}) + "\n" for page in pages))
    assert documents(str(tmp_path / "pages.jsonl"), 10**9) == (pages, "pages.jsonl")
    assert documents(str(tmp_path), 100)[0] == pages[:1]


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
    first, again, other = (Windows(tokens, 10, 25, seed) for seed in (1, 1, 2))
    assert [w["input_ids"][0].item() for w in first] == [w["input_ids"][0].item() for w in again]
    starts, others = ([w["input_ids"][0].item() for w in windows] for windows in (first, other))
    assert starts != others
    assert sorted(starts[:10]) == sorted(starts[10:20]) == list(range(0, 100, 10))
    assert starts[:10] != starts[10:20]
    assert first[0]["input_ids"].tolist() == list(range(starts[0], starts[0] + 10))
    assert [first[i]["input_ids"][0].item() for i in (24, 3, 12)] == [starts[i] for i in (24, 3, 12)]
    # the order of one seed, written down: checkpoints continue in it
    rng = np.random.default_rng(1)
    assert starts == [10 * i for _ in range(3) for i in rng.permutation(10)][:25]
    with pytest.raises(UserError, match="less than one window"):
        Windows(tokens, 101, 1, 0)


def test_examples_stay_within_the_training_length_and_batches_have_one_length(loaded):
    recipe = smoke()
    examples = training.stage_examples("finetune", loaded, recipe, seed=4)
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


def counts(example, loaded):
    text = loaded.tokenizer.decode(example.prompt)
    return text.count(" Tokyo") - 1, loaded.tokenizer.decode(example.answer)


def test_count_examples_hold_what_they_ask_for(loaded):
    task = count_task(loaded, loaded.held_out.reshape(-1))
    examples = [task.example(60, np.random.default_rng(i)) for i in range(200)]
    assert {len(example.prompt + example.answer) for example in examples} == {60}
    for example in examples:
        marks, answer = counts(example, loaded)
        assert answer == f" {marks}"
    assert {counts(example, loaded)[0] for example in examples} == set(range(10))
    model = build_model(smoke(), "paper", "a", 0, loaded.tokenizer.get_vocab_size())
    digit = examples[3].answer[0]
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        model.lm_head.bias[digit] = 99  # a model that always says the same number
    assert counted(model, examples) == [example.answer == [digit] for example in examples]


@pytest.mark.parametrize("form", ["paper", "qk-norm", "partial-rope"])
def test_variants_of_a_seed_share_their_weights(form):
    models = {variant: build_model(smoke(), form, variant, 3, 300) for variant in "abcdfgtqp"}
    other = build_model(smoke(), form, "a", 4, 300)
    weights = models["a"].state_dict()
    scales = [f"model.layers.{i}.self_attn.ssmax" for i in range(2)]
    more = {
        "a": set(),
        "b": {f"{scale}.weight" for scale in scales},
        "c": set(),
        "d": {f"{scale}.{name}" for scale in scales for name in ("weight", "bias")},
        "f": {f"{scale}.weight" for scale in scales},
        "g": {f"{scale}.{name}" for scale in scales for name in ("s", "gamma")},
        "t": {f"{scale}.t" for scale in scales},
        "q": {
            f"{scale}.{of}.{layer}.{name}"
            for scale in scales
            for of in ("of_n", "of_query")
            for layer in (0, 2)
            for name in ("weight", "bias")
        },
        "p": {f"{scale}.{name}" for scale in scales for name in ("weight", "bias")} | {"learned_p"},
    }
    for variant, model in models.items():
        state = model.state_dict()
        assert set(state) - set(weights) == more[variant]
        assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert not torch.equal(weights["lm_head.weight"], other.state_dict()["lm_head.weight"])


def logits(model):
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model.eval()(tokens).logits


def test_what_each_variant_computes():
    models = {variant: build_model(smoke(), "qk-norm", variant, 3, 300) for variant in "abcdfgtqp"}
    found = {variant: logits(model) for variant, model in models.items()}
    assert torch.equal(found["f"], found["a"])  # until it is switched
    torch.testing.assert_close(found["p"], found["a"], rtol=0, atol=1e-6)  # it starts as Softmax
    torch.testing.assert_close(found["d"], found["b"], rtol=0, atol=1e-6)  # b starts at 0
    assert torch.equal(found["t"], found["a"])  # t starts at 1
    torch.testing.assert_close(found["q"], found["b"], rtol=0, atol=1e-5)  # its networks start at s log n
    with torch.no_grad():  # with gamma = 1 it is (b)
        for layer in models["g"].model.layers:
            layer.self_attn.ssmax.gamma.fill_(1.0)
            layer.self_attn.ssmax.s.fill_(ssmax.matched_scale(smoke().train_length))
    torch.testing.assert_close(logits(models["g"]), found["b"], rtol=0, atol=1e-6)
    set_switches(models["f"], True)
    assert torch.equal(logits(models["f"]), found["b"])
    with torch.no_grad():
        for layer in models["b"].model.layers:
            layer.self_attn.ssmax.weight.fill_(1.0)
    torch.testing.assert_close(logits(models["b"]), found["c"], rtol=0, atol=1e-6)
    with torch.no_grad():  # p_n = log n is (c) as well
        models["p"].learned_p.copy_(torch.arange(1, 65).float().log())
    torch.testing.assert_close(logits(models["p"]), found["c"], rtol=0, atol=1e-6)
    for pair in ("ab", "ac", "bc", "bg"):
        assert (found[pair[0]] - found[pair[1]]).abs().max() > 1e-3


def test_the_late_switch_is_softmax_for_seven_eighths_and_ssmax_then(loaded, tmp_path):
    recipe = dataclasses.replace(smoke(), steps=16)
    losses, scales = {}, {}
    for variant in "abf":
        model = build_model(recipe, "paper", variant, 0, loaded.tokenizer.get_vocab_size())
        trained = training.pretrain(model, recipe, loaded.train, 0, tmp_path / variant, lambda tokens: None)
        losses[variant] = dict(trained.losses)
        scales[variant] = [m.weight for m in model.modules() if isinstance(m, SwitchedScale)]
    assert switch_at(recipe) == 14
    # The norm that gradients are clipped by sums the zeros of s in between, which may move its last bit.
    last_bits = 2 * float(np.spacing(np.float32(losses["a"][1])))
    for step in range(1, 15):
        assert losses["f"][step] == pytest.approx(losses["a"][step], abs=last_bits)
    assert max(abs(losses["b"][step] - losses["a"][step]) for step in range(1, 15)) > 10 * last_bits
    assert abs(losses["f"][15] - losses["a"][15]) > 10 * last_bits
    assert all((scale != ssmax.matched_scale(recipe.train_length)).all() for scale in scales["f"])  # trained since


def test_the_late_switch_continues_the_softmax_model_s_training_where_both_are_trained(loaded, tmp_path):
    both = dataclasses.replace(smoke(), steps=16, models=("paper:af",), retrieval=(), counting=())
    alone = dataclasses.replace(both, models=("paper:f",))
    a, f = Job("paper", "a", 0), Job("paper", "f", 0)
    done = {}

    def trained(job, recipe, folder):
        done[folder, job] = []
        rows = STAGES["pretrain"].run(job, recipe, loaded, tmp_path / folder, done[folder, job].append)
        model = training.pretrained(job, recipe, tmp_path / folder)
        return {row.at["step"]: row.value for row in rows if row.metric == "train_loss"}, model

    softmax, plain = trained(a, both, "both")
    branched, model = trained(f, both, "both")
    expected, other = trained(f, alone, "alone")
    tokens = both.batch_size * both.train_length
    assert done["both", f][0] == switch_at(both) * tokens
    assert sum(done["both", f]) == 16 * tokens
    assert {step: branched[step] for step in range(1, 15)} == {step: softmax[step] for step in range(1, 15)}
    assert branched == expected
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))
    assert not hasattr(plain.config, "ssmax")
    assert not any("ssmax" in name for name in plain.state_dict())
    assert not list((tmp_path / "both").glob("*/*checkpoints"))


def test_a_softmax_training_that_began_without_the_late_switch_goes_on_without_it(loaded, tmp_path):
    both = dataclasses.replace(smoke(), steps=16, checkpoint_steps=8, models=("paper:af",), retrieval=(), counting=())
    a, scratch = Job("paper", "a", 0), tmp_path / "paper-a-0" / training.SCRATCH
    half = dataclasses.replace(both, steps=8, warmup_steps=5)
    model = build_model(both, "paper", "a", 0, loaded.vocab_size, loaded.end)
    training.pretrain(model, half, loaded.train, 0, scratch, lambda tokens: None)
    checkpoints.seal(scratch / "checkpoint-8", checkpoints.owner(scratch, both))
    done = []
    STAGES["pretrain"].run(a, both, loaded, tmp_path, done.append)
    assert done[0] == 8 * both.batch_size * both.train_length  # the checkpoint is continued
    assert not (tmp_path / "paper-f-0").exists()


def test_the_afterwards_switched_model_is_the_trained_softmax_model(loaded, tmp_path):
    recipe = dataclasses.replace(smoke(), steps=4)
    a, e = Job("paper", "a", 0), Job("paper", "e", 0)
    STAGES["pretrain"].run(a, recipe, loaded, tmp_path, lambda tokens: None)
    rows = {
        job.variant: STAGES["position_loss"].run(job, recipe, loaded, tmp_path, lambda tokens: None) for job in (a, e)
    }
    assert recipe.stages(e) == ["position_loss"]
    assert [row.at for row in rows["a"]] == [row.at for row in rows["e"]]
    assert all(x.value != y.value for x, y in zip(rows["a"], rows["e"], strict=True))
    assert not (tmp_path / e.name).exists()
    laws = {"l": ("llama-4", {"scale": 0.1, "floor": 64}), "y": ("yarn", {"factor": 4})}
    for letter, (law, parameters) in laws.items():
        spec = training.pretrained(Job("paper", letter, 0), recipe, tmp_path).config.ssmax
        assert (spec["law"], spec["parameters"]) == (law, parameters)


def test_what_each_head_learned_is_in_the_rows(loaded, tmp_path):
    recipe, job = dataclasses.replace(smoke(), steps=4), Job("paper", "g", 0)
    rows = STAGES["pretrain"].run(job, recipe, loaded, tmp_path, lambda tokens: None)
    learned = {(r.at["name"], r.at["layer"], r.at["head"]): r.value for r in rows if r.metric == "learned_scale"}
    layers = training.pretrained(job, recipe, tmp_path).model.layers
    assert len(learned) == 2 * 2 * 2
    for (name, layer, head), value in learned.items():
        assert layers[layer].self_attn.ssmax.learned[name][head].item() == value
    assert [row.value for row in rows if row.metric == "scale_parameters"] == [8]


@pytest.mark.parametrize(("rope", "factor"), [("theta", 50), ("llama3", 2)])
def test_losses_of_texts_are_those_by_position_and_retrieval_begins_where_it_was_trained(
    loaded, tmp_path, rope, factor, monkeypatch
):
    recipe = dataclasses.replace(
        smoke(), steps=2, finetune_steps=2, length_factor=2, needle_rope=rope, needle_theta_factors=(factor,)
    )
    used = set()
    forward = LlamaRotaryEmbedding.forward
    monkeypatch.setattr(
        LlamaRotaryEmbedding,
        "forward",
        lambda self, *args, **kwargs: used.add(tuple(self.inv_freq.tolist())) or forward(self, *args, **kwargs),
    )
    a = Job("paper", "a", 0)
    rows = []
    for stage in ("pretrain", "position_loss", "finetune", "retrieval"):
        rows += STAGES[stage].run(a, recipe, loaded, tmp_path, lambda tokens: None)
    texts = [row for row in rows if row.metric == "text_loss"]
    assert {row.at["theta_factor"] for row in texts} == {50}
    assert {row.at["text"] for row in texts} == set(range(len(loaded.held_out)))
    for first, last in ((1, 64), (65, 128)):
        of_texts = [row.value for row in texts if (row.at["from"], row.at["position"]) == (first, last)]
        bins = [
            row
            for row in rows
            if row.metric == "loss_by_position" and row.at["theta_factor"] == 50 and first <= row.at["position"] <= last
        ]
        tokens = sum(row.samples for row in bins)
        assert tokens == len(of_texts) * 64
        whole = sum(row.value * row.samples for row in bins) / tokens
        assert np.mean(of_texts) == pytest.approx(whole, abs=1e-9)
    asked = {
        (r.at["theta_factor"], r.at.get("rope", "theta"), r.at["length"])
        for r in rows
        if r.metric == "retrieval_accuracy"
    }
    assert asked == {(1, "theta", 64), (factor, rope, 64), (factor, rope, 128)}
    whole_turns = 64 / (2 * math.pi) * (trained := PAPER_THETA ** -(np.arange(8) / 8))
    kept = np.clip((whole_turns - 1) / 3, 0, 1)  # Llama 3.1's rule: below one turn divided, from four turns on kept
    stretched = {
        "theta": (PAPER_THETA * factor) ** -(np.arange(8) / 8),
        "llama3": trained * (kept + (1 - kept) / factor),
    }[rope]
    assert any(np.allclose(frequencies, stretched, rtol=1e-5) for frequencies in used)


def test_the_paper_size_has_the_papers_parameters(capsys):
    recipe = paper()
    with torch.device("meta"):
        model = build_model(recipe, "paper", "b", 0, recipe.vocab_size)
    scales = sum(p.numel() for name, p in model.named_parameters() if ".ssmax." in name)
    norms = 25 * 768  # the paper's count leaves them out
    assert scales == 144
    assert sum(p.numel() for p in model.parameters()) == 162_129_408 + scales + norms
    assert recipe.batch_size * recipe.train_length == 2_097_152


def test_theta_follows_the_training_length():
    def complete(recipe):
        """Frequencies of a head whose wavelength is no longer than the training window, counted one by one."""
        model = build_model(recipe, "paper", "a", 0, 300)
        wavelengths = 2 * math.pi / model.model.rotary_emb.inv_freq
        return (wavelengths <= recipe.train_length).double().mean().item()

    small_paper = dataclasses.replace(paper(), num_layers=1, hidden_size=128, num_heads=2, vocab_size=300)
    assert complete(small_paper) == 18 / 32
    assert complete(laptop()) == 9 / 16
    assert complete(tiny()) == 7 / 12
    assert complete(dataclasses.replace(laptop(), theta=10_000.0)) == 6 / 16
    assert dataclasses.replace(tiny(), train_length=1024).rope_theta == pytest.approx(10_000)
    for length in (64, 128, 4096):
        assert turns(dataclasses.replace(tiny(), train_length=length).rope_theta, length) == pytest.approx(
            0.553, abs=1e-3
        )
    assert turns(dataclasses.replace(tiny(), full_turns=0.8).rope_theta, 128) == pytest.approx(0.8)


def test_a_run_of_0_1_0_is_continued(tmp_path):
    recipe = smoke()
    run = RunFolder(tmp_path, recipe, None)
    run.claim("hash")
    kept = json.loads((tmp_path / "recipe.json").read_text())
    for later in LATER:
        del kept["recipe"][later]
    (tmp_path / "recipe.json").write_text(json.dumps(kept))
    with run.opened():
        pass
    with (
        pytest.raises(UserError, match=r"theta was 10000.0, is 233.0"),
        dataclasses.replace(run, recipe=dataclasses.replace(recipe, theta=233.0)).opened(),
    ):
        pass
    # earlier versions named the owner of a checkpoint by a hash of its own fields
    own = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in LATER}
    digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]
    assert checkpoints.owner(tmp_path / "paper-a-0" / "pretrained", recipe).endswith(digest)


@pytest.mark.parametrize("form", FORMS)
def test_the_last_layer_computes_only_the_answer_and_loss_and_gradients_are_the_same(loaded, tmp_path, form):
    recipe = dataclasses.replace(smoke(), finetune_steps=1)
    examples = training.stage_examples("finetune", loaded, recipe, 0)
    batch = [examples[i] for i in range(recipe.finetune_batch_size)]
    inputs = {name: torch.stack([item[name] for item in batch]) for name in batch[0]}
    model = build_model(recipe, form, "b", 0, loaded.tokenizer.get_vocab_size()).double()
    loss = model(**inputs).loss
    loss.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    got, rows = {}, []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda of, name=name: got.update({name: of.grad.clone()}))
    last = model.model.layers[-1]
    for module in (model.lm_head, last.mlp.down_proj, last.self_attn.o_proj):
        module.register_forward_hook(lambda module, arguments, output: rows.append(output.shape[1]))
    trained = training.finetune(model, recipe, examples, tmp_path, lambda tokens: None)
    # The norms round to float32 in any dtype, so a last bit of float64 may become one of float32.
    assert trained.losses[0][1] == pytest.approx(loss.item(), rel=1e-6)
    assert rows == [recipe.needle_digits + 1] * 3
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


NO_DROPOUT = {"gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), "opt": {"dropout": 0.0}}


@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt2", "opt", "phi", "qwen3_moe"])
def test_families_that_are_not_built_like_llama_are_fine_tuned(loaded, tmp_path, family):
    recipe = dataclasses.replace(smoke(), finetune_steps=1)
    examples = training.stage_examples("finetune", loaded, recipe, 0)
    batch = [examples[i] for i in range(recipe.finetune_batch_size)]
    inputs = {name: torch.stack([item[name] for item in batch]) for name in batch[0]}
    model = tiny_model(family, vocab_size=loaded.tokenizer.get_vocab_size(), **NO_DROPOUT.get(family, {})).train()
    with torch.no_grad():
        loss = model(**inputs).loss
    trained = training.finetune(model, recipe, examples, tmp_path, lambda tokens: None)
    assert trained.losses[0][1] == pytest.approx(loss.item(), rel=1e-5)


def test_trackers_are_told_what_is_computed(loaded, tmp_path, monkeypatch):
    recipe = dataclasses.replace(smoke(), finetune_steps=1)
    told = []
    real = loop.TrainingArguments
    monkeypatch.setattr(loop, "TrainingArguments", lambda **given: told.append(made := real(**given)) or made)
    model = build_model(recipe, "paper", "b", 0, loaded.tokenizer.get_vocab_size())
    training.finetune(
        model, recipe, training.stage_examples("finetune", loaded, recipe, 0), tmp_path, lambda tokens: None
    )
    (arguments,) = told
    assert arguments.learning_rate == recipe.finetune_learning_rate
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.weight_decay) == (0.9, 0.999, 0.0)


def test_the_plan_counts_what_is_built():
    recipe = smoke()
    lines = "\n".join(plan(recipe))
    model = build_model(recipe, "paper", "b", 0, recipe.vocab_size)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert f"parameters: {matrices:,} in matrices, {5 * 32:,} in norms, 4 scales s" in lines
    assert f"{(5 * 30 + 4) * 8 * 64:,} in 6 pretrainings" in lines  # (f) takes the last four steps by itself
    assert "disk: 9 models" in lines  # five pretrained and saved, four fine-tuned
    assert "tokens a second" in lines


@pytest.mark.parametrize("recipe", [smoke, tiny, laptop, small, paper])
def test_recipes_hold_together(recipe):
    made = recipe()
    assert len({job.name for job in made.jobs}) == len(made.jobs)
    assert all(made.stages(job) for job in made.jobs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": ("paper:be",)}, "e is made of a"),
        ({"models": ("llama:ab",)}, "FORM:LETTERS"),
        ({"models": ("paper:ax",)}, "FORM:LETTERS"),
        ({"models": ("paper:a", "paper:b")}, "each once"),
        ({"retrieval": ("paper:c",), "models": ("paper:ab",)}, "--retrieval paper:c asks for models"),
        ({"counting": ("paper:p",)}, "--counting paper:p"),
        ({"hidden_size": 36}, "--hidden-size must be a multiple of twice --num-heads"),
        ({"train_length": 1}, "--train-length must be at least 2"),
        ({"steps": 0}, "--steps must be positive"),
        ({"warmup_steps": -1}, "--warmup-steps must be at least 0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive"),
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (1, 2, 1)}, "--seeds must name each once, got 1 2 1"),
        ({"depths": (0.5, 2.0)}, "--depths must lie in 0 to 1"),
    ],
)
def test_a_recipe_that_makes_no_sense(change, words):
    with pytest.raises(UserError, match=words):
        Recipe(name="mine", **change)


def test_a_loss_that_is_not_finite_stops_the_run(loaded, tmp_path):
    recipe = dataclasses.replace(smoke(), learning_rate=1e30, warmup_steps=1)
    model = build_model(recipe, "paper", "a", 0, loaded.tokenizer.get_vocab_size())
    with pytest.raises(RunFailed, match=r"step 3: .* not finite .* lower --learning-rate"):
        training.pretrain(model, recipe, loaded.train, 0, tmp_path, lambda tokens: None)


def test_rows_say_when_the_code_was_changed(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    file = tmp_path / "src" / "ssmax" / "lab" / "provenance.py"
    file.parent.mkdir(parents=True)
    file.write_text("1\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(provenance, "__file__", str(file))
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert provenance.commit() == head
    file.write_text("2\n")
    assert provenance.commit() == head + "+"
