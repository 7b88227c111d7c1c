"""ssmax evaluate of models that do not fit the job: one line with the cause and what to do, before any weight is read."""

import json
import time

import pytest
import torch
from command_line import call
from plain_bytes import byte_tokenizer
from tiny_models import tiny_config, tiny_model
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig

from ssmax.compare import run as suite
from ssmax.compare.checks import check_fit
from ssmax.compare.stages import Needs
from ssmax.errors import UserError
from ssmax.runs.rows import read_rows

SIZES = {"vocab_size": 300, "max_position_embeddings": 256}
QUICK = ("--length", "150", "--sizes", "150", "--depths", "0.5", "--documents", "1", "--trials", "1", "--chunk", "64")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("A plain text of several words. " * 200)
    return path


def poisoned():
    model = tiny_model("llama", **SIZES)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    return model


def overflowing():
    model = tiny_model("llama", **SIZES)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 1e4
            layer.mlp.up_proj.weight *= 1e4
    return model.half()


MODELS = {
    "positions": lambda: tiny_model("gpt2", vocab_size=300, n_positions=64),
    "opt positions": lambda: tiny_model("opt", vocab_size=300, max_position_embeddings=64),
    "vocabulary": lambda: tiny_model("llama", **SIZES | {"vocab_size": 90}),
    "nan": poisoned,
    "overflow": overflowing,
    "mamba": lambda: tiny_model("mamba", vocab_size=300),
    "bert": lambda: tiny_model("bert", **SIZES),
    "t5": lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)),
}
WORDS = {
    "positions": ("loss asks for 150 tokens", "64 positions", "--length of at most 64"),
    "opt positions": ("64 positions", "--length of at most 64"),
    "vocabulary": ("the tokenizer has token 2", "ends at 89 (90 tokens)", "tokenizer"),
    "nan": ("not numbers (nan)", "lm_head.weight", "not finite"),
    "overflow": ("nan", "overflow in torch.float16", "--dtype float32"),
    "mamba": ("no attention weights", "--measures loss retrieval"),
    "bert": ("not causal", "is_decoder"),
    "t5": ("'t5'", "encoder-decoder"),
}


def evaluate(capsys, tmp_path, text, *options):
    status, _, err = call(
        capsys,
        "evaluate",
        tmp_path / "model",
        "--texts",
        text,
        *QUICK,
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
        *options,
    )
    return status, err.strip().splitlines()[-1], err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_does_not_fit_is_one_line(kind, capsys, tmp_path, text, record):
    MODELS[kind]().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    status, line, err = evaluate(capsys, tmp_path, text)
    assert status == 2, err
    assert line.startswith("ssmax: model") or str(tmp_path) in line
    assert "Traceback" not in err
    assert "same command" not in line
    for word in WORDS[kind]:
        assert word in line
    if kind == "mamba":
        status, _, err = evaluate(
            capsys, tmp_path, text, "--measures", "loss", "retrieval", "--out", str(tmp_path / "two")
        )
        assert status == 0, err
    record("a model that does not fit ssmax evaluate", 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["positions", "vocabulary"])
def test_calibrate_asks_for_no_more_than_a_model_has(kind, capsys, tmp_path, text):
    MODELS[kind]().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    status, _, err = call(
        capsys, "calibrate", tmp_path / "model", tmp_path / "new", "--texts", text, "--length", 150, "--steps", 1
    )
    assert status == 2
    (line,) = err.strip().splitlines()
    for word in WORDS[kind]:
        assert word.replace("loss asks", "calibrate asks") in line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "nonsense"}, "rope_type must be one of"),
        ({"rope_type": "linear", "factor": "x"}, "cannot be made of"),
        ({"rope_type": "linear", "factor": -2}, "negative or not finite"),
        ({"rope_type": "yarn", "factor": 0}, "RoPE of type 'yarn'"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0, 3.0]}, "RoPE of type 'longrope'"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"rope_type": "longrope", "short_factor": 1, "long_factor": 2}, "RoPE of type 'longrope'"),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 0, "high_freq_factor": 4}, "RoPE of type 'llama3'"),
    ],
)
def test_a_bad_rope_is_told_before_the_folder_is_claimed(rope, words, capsys, tmp_path, text):
    tiny_model("llama", **SIZES).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    status, line, _ = evaluate(capsys, tmp_path, text, "--rope", json.dumps(rope))
    assert status == 2
    assert words in line
    assert not list((tmp_path / "run").glob("*.json"))


@pytest.mark.parametrize("measures", [("retrieval",), ("attention",), ("loss",)])
def test_a_model_of_nan_is_refused_by_each_measure(measures, capsys, tmp_path, text):
    poisoned().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    status, line, _ = evaluate(capsys, tmp_path, text, "--measures", *measures)
    assert status == 2
    assert "lm_head.weight" in line


def test_folders_that_hold_no_model(capsys, tmp_path, text):
    folder = tmp_path / "model"
    begun = time.monotonic()
    status, line, _ = evaluate(capsys, tmp_path, text)
    assert (status, time.monotonic() - begun < 20) == (2, True)
    assert f"{folder} cannot be loaded: there is no such folder" in line
    folder.mkdir()
    assert "no config.json" in evaluate(capsys, tmp_path, text)[1]
    ViTConfig().save_pretrained(folder)
    assert "'vit', of which transformers has no causal language model" in evaluate(capsys, tmp_path, text)[1]
    tiny_config("llama", **SIZES).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert "no weights as safetensors" in evaluate(capsys, tmp_path, text)[1]
    torch.save({}, folder / "pytorch_model.bin")
    assert "pickles can run code" in evaluate(capsys, tmp_path, text)[1]
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    status, line, _ = evaluate(capsys, tmp_path, text)
    assert status == 2
    for word in ("adapter", "some/base", "merge_and_unload"):
        assert word in line


def test_all_models_are_checked_before_the_first_is_loaded(capsys, tmp_path, text, monkeypatch):
    monkeypatch.setattr(suite, "_load", lambda *rest: pytest.fail("a model was loaded"))
    tiny_model("llama", **SIZES).save_pretrained(tmp_path / "good")
    tiny_model("gpt2", vocab_size=300, n_positions=64).save_pretrained(tmp_path / "model")
    for name in ("good", "model"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    for more in ((), ("--dry-run",)):
        status, _, err = call(
            capsys,
            "evaluate",
            tmp_path / "good",
            tmp_path / "model",
            "--texts",
            text,
            *QUICK,
            "--out",
            tmp_path / "run",
            *more,
        )
        assert status == 2
        assert "64 positions" in err


@pytest.mark.filterwarnings("ignore")
def test_heads_that_differ_by_layer_are_rows_of_their_own(capsys, tmp_path, text):
    model = tiny_model("laguna", num_attention_heads_per_layer=[4, 2], vocab_size=300, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    status, _, err = evaluate(capsys, tmp_path, text)
    assert status == 0, err
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    heads = {(row.at["layer"], row.at["head"]) for row in rows if row.metric == "needle_score"}
    assert heads == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)}


class Few:
    """A tokenizer of 90 tokens and one for padding, which was added."""

    all_special_ids = (5000,)

    def get_vocab(self):
        return {str(i): i for i in (*range(90), *self.all_special_ids)}


@pytest.mark.parametrize(
    ("family", "changes", "limited"),
    [
        ("gpt2", {"n_positions": 64}, True),
        ("bart", {"decoder_layers": 1, "d_model": 32}, True),
        ("ctrl", {"n_positions": 64}, True),
        ("gptj", {"rotary_dim": 8, "n_positions": 64}, True),
        ("openai-gpt", {"n_positions": 64}, True),
        ("llama", {}, False),
        ("gpt_neox", {}, False),
        ("bloom", {}, False),
        ("xglm", {"attention_heads": 4}, False),
        ("mamba", {}, False),
    ],
)
def test_positions_that_are_a_table_end_and_computed_ones_do_not(family, changes, limited):
    config = tiny_config(family, **changes)
    tokenizer = Few()
    known = getattr(config, "max_position_embeddings", 64)
    check_fit(config, tokenizer, {"loss": Needs(1, known, "--length", 90)})
    asked = {"loss": Needs(1, known + 1, "--length", 90)}
    if limited:
        with pytest.raises(UserError, match=f"{known:,} positions"):
            check_fit(config, tokenizer, asked)
    else:
        check_fit(config, tokenizer, asked)


def test_a_fine_tuned_model_is_sealed_and_read_only_whole(capsys, tmp_path, text):
    tiny_model("llama", **SIZES).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = (
        "--measures",
        "retrieval",
        "--finetune-steps",
        "1",
        "--finetune-length",
        "150",
        "--finetune-batch-size",
        "1",
    )
    assert evaluate(capsys, tmp_path, text, *options)[0] == 0
    run = tmp_path / "run"
    tuned = run / "models" / "model" / "finetuned"
    assert json.loads((tuned / "seal.json").read_text())["owner"].startswith("model finetuned of recipe ")
    for lost in (run / "rows.jsonl", run / "stages" / "model.needle.jsonl"):
        lost.unlink()
    weights = tuned / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    status, line, _ = evaluate(capsys, tmp_path, text, *options)
    assert status == 2
    assert "model.safetensors is damaged or changed" in line
    assert "delete models/model and stages/model.finetune.*" in line
    weights.write_bytes(whole)
    (tuned / "seal.json").rename(tmp_path / "seal.json")
    assert "not written completely" in evaluate(capsys, tmp_path, text, *options)[1]
    (tmp_path / "seal.json").rename(tuned / "seal.json")
    assert evaluate(capsys, tmp_path, text, *options)[0] == 0
