"""ssmax evaluate as a person meets it: folders, options, resuming, errors in one line."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import call
from faults import PATIENCE
from plain_bytes import byte_tokenizer
from tiny_models import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

import ssmax
from ssmax.compare import run as suite
from ssmax.compare import stages
from ssmax.compare.settings import Settings
from ssmax.errors import UserError
from ssmax.runs.rows import read_rows

QUICK = ("--length", "300", "--sizes", "200", "300", "--depths", "0", "1", "--documents", "2", "--trials", "2")


def save_model(folder, convert):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape))
    (ssmax.convert(model, 0.3) if convert else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    save_model(root / "plain", False)
    save_model(root / "sharp", True)
    (root / "texts").mkdir()
    rng = random.Random(0)
    for i in range(3):
        words = rng.choices(["some", "words", "of", "no", "great", "meaning"], k=400)
        (root / "texts" / f"{i}.txt").write_text(" ".join(words))
    return root


def evaluate(capsys, folder, *options, models=("plain", "sharp")):
    sources = [folder / model for model in models]
    return call(capsys, "evaluate", *sources, "--texts", folder / "texts", *options)


@pytest.fixture(scope="module")
def finished(folder):
    command = [
        sys.executable,
        "-m",
        "ssmax",
        "evaluate",
        folder / "plain",
        folder / "sharp",
        "--texts",
        folder / "texts",
    ]
    command += [*QUICK, "--tasks", "needle", "abc", "--out", folder / "run"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_rows_figures_report_and_tables(finished):
    run, done = finished
    rows = read_rows(run / "rows.jsonl")
    assert {row.variant for row in rows} == {"plain", "sharp"}
    assert {row.metric for row in rows} == {
        "loss_by_position", "attention_entropy", "largest_weight", "retrieval_accuracy", "first_digit_accuracy",
        "needle_score", "top_needle_score",
    }  # fmt: skip
    for row in rows:
        assert {"commit", "torch", "transformers", "time", "device"} <= row.provenance.keys()
    cells = [row.at for row in rows if row.metric == "retrieval_accuracy" and row.variant == "plain"]
    assert len(cells) == 2 * 2 * 2
    assert all(row.at["low"] < row.value < row.at["high"] for row in rows if row.metric == "loss_by_position")
    names = {"loss", "retrieval", "needle_scores", "attention"}
    assert {p.name for p in (run / "figures").iterdir()} == {f"{n}.{k}" for n in names for k in ("png", "svg")}
    page = (run / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 4
    assert "//" not in page.replace("data:image/svg+xml;base64", "").split("<h2>Figures")[0].replace("</", "")
    for words in ("Loss by position", "one needle: whole number right", "plain", "sharp", str(run / "report.html")):
        assert words in done.stdout
    assert "Traceback" not in done.stderr


def test_the_numbers_are_those_of_the_functions(finished, folder):
    from ssmax.evaluation import loss_by_position

    rows = [r for r in read_rows(finished[0] / "rows.jsonl") if r.metric == "loss_by_position" and r.variant == "sharp"]
    model = suite._load(str(folder / "sharp"), Settings("x", ("sharp",)), suite.Machine("cpu"))
    texts, _ = suite._texts(str(folder / "texts"), Settings("x", ("sharp",)))
    ids = torch.stack([torch.tensor(byte_tokenizer()(text)["input_ids"][:300]) for text in texts[:2]])
    losses = loss_by_position(model, ids).mean(0)
    first = [row for row in rows if row.at["position"] == 8]
    assert first[0].value == pytest.approx(losses[:8].mean().item(), rel=1e-5)
    assert sum(row.samples for row in rows) == 2 * 299


def test_it_resumes_and_repeats_nothing(finished, folder, capsys, monkeypatch):
    run, done = finished
    options = (*QUICK, "--tasks", "needle", "abc", "--out", run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    status, out, _ = evaluate(capsys, folder, *options, "--chunk", "64", "--device", "cpu")
    assert status == 0
    assert out == done.stdout
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before
    values = [(r.metric, r.variant, r.at, r.value) for r in read_rows(run / "rows.jsonl")]
    lost = run / "stages" / "sharp.abc.jsonl"
    lost.unlink()
    (run / "rows.jsonl").unlink()
    measured = []
    monkeypatch.setattr(
        suite, "run_stage", lambda stage, *rest: measured.append(stage) or stages.run_stage(stage, *rest)
    )
    assert evaluate(capsys, folder, *options)[0] == 0
    assert measured == ["abc"]
    assert [(r.metric, r.variant, r.at, r.value) for r in read_rows(run / "rows.jsonl")] == values


def test_another_configuration_or_another_model_is_refused(finished, folder, capsys):
    options = (*QUICK, "--tasks", "needle", "abc", "--out", finished[0])
    status, _, err = evaluate(capsys, folder, *options, "--seed", "1")
    assert status == 2
    assert "seed was 0, is 1" in err
    model = folder / "sharp" / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content)
    status, _, err = evaluate(capsys, folder, *options)
    assert status == 2
    assert "hash" in err


def test_json_and_dtype_and_rope(folder, capsys, tmp_path):
    status, out, _ = evaluate(
        capsys, folder, *QUICK, "--measures", "loss", "--json", "--out", tmp_path / "run", "--dtype", "bfloat16",
        "--theta-factor", "4", "--rope", '{"rope_type": "yarn", "factor": 2}', models=["sharp"],
    )  # fmt: skip
    assert status == 0
    found = json.loads(out)
    assert {entry["model"] for entry in found} == {"sharp"}
    assert all(entry["value"] > 0 for entry in found)
    (row, *_) = read_rows(tmp_path / "run" / "rows.jsonl")
    assert row.at["theta_factor"] == 4
    assert "yarn" in row.at["rope"]


def test_fine_tuning_before_retrieval(folder, capsys, tmp_path):
    options = (
        "--measures",
        "retrieval",
        "--finetune-steps",
        "2",
        "--finetune-length",
        "160",
        "--finetune-batch-size",
        "2",
    )
    status, _, err = evaluate(capsys, folder, *QUICK, *options, "--out", tmp_path / "run", models=["sharp"])
    assert status == 0, err
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    assert [row.at["step"] for row in rows if row.metric == "train_loss"] == [1, 2]
    assert all(row.at["finetune_steps"] == 2 for row in rows if row.metric == "retrieval_accuracy")
    assert (tmp_path / "run" / "models" / "sharp" / "finetuned" / "model.safetensors").exists()


def test_a_dry_run_says_what_sharing_saves_and_writes_nothing(folder, capsys, tmp_path):
    status, out, _ = evaluate(capsys, folder, *QUICK, "--dry-run", "--out", tmp_path / "run")
    assert status == 0
    assert "needle" in out
    assert "without shared prefixes: 2,000 tokens" in out
    assert "nothing was written" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--length", "9000"), ["too short", "no document has 9,000 tokens", "smaller --length"]),
        (("--sizes", "20", "--measures", "retrieval"), ["needs", "tokens for needle"]),
        (("--prompt", "chat", "--measures", "retrieval"), ["no chat template"]),
        (("--trials", "0"), ["--trials must be positive"]),
        (("--tasks", "abc", "abc"), ["--tasks must name each once"]),
        (("--chunk", "0"), ["--chunk must be positive"]),
        (("--depths", "2"), ["0 to 1"]),
        (("--rope", "yarn"), ["JSON"]),
        (("--rope", '{"rope_type": "linear"}', "--measures", "loss"), ["needs", "factor"]),
        (("--device", "quantum"), ["quantum is not available", "cpu"]),
    ],
)
def test_bad_input_is_one_line(folder, capsys, tmp_path, options, words):
    base = ["--length", "300", "--documents", "1", "--trials", "1", "--sizes", "200"]
    kept = [x for i in range(0, len(base), 2) if base[i] not in options for x in base[i : i + 2]]
    status, _, err = evaluate(capsys, folder, *kept, *options, "--out", tmp_path / "run", models=["plain"])
    line = err.strip().splitlines()[-1]
    assert status == 2, err
    assert line.startswith("ssmax: ")
    assert "Traceback" not in err
    for word in words:
        assert word in line


def test_a_model_without_rope_or_without_a_tokenizer(folder, capsys, tmp_path):
    tiny_model("gpt2", vocab_size=300, n_positions=512).save_pretrained(tmp_path / "gpt2")
    out = ("--out", tmp_path / "run", *QUICK)
    status, _, err = evaluate(capsys, folder, *out, "--theta-factor", "50", models=[tmp_path / "gpt2"])
    assert status == 2
    assert "no tokenizer" in err
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    status, _, err = evaluate(
        capsys, folder, "--out", tmp_path / "run2", *QUICK, "--theta-factor", "50", models=[tmp_path / "gpt2"]
    )
    assert status == 2
    assert "no RoPE" in err.splitlines()[-1]


def test_memory_that_runs_out_is_advice(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "loss_rows", lambda *a, **k: torch.empty(2**46))  # torch's own refusal
    status, _, err = evaluate(capsys, folder, *QUICK, "--out", tmp_path / "run", models=["plain"])
    assert status == 1
    for word in ("memory ran out", "--chunk (now 1024)", "--length", "another --chunk continues"):
        assert word in err.splitlines()[-1]


def test_models_of_one_name_keep_their_paths(tmp_path, monkeypatch):
    jobs = Settings("x", ("runs/a/model", "runs/b/model", "other")).jobs
    assert [job.name for job in jobs] == ["runs-a-model", "runs-b-model", "other"]
    assert [job.name for job in Settings("x", ("/m/one", "two/")).jobs] == ["one", "two"]
    assert [job.name for job in Settings("x", ("x/a/b", "x-a/b")).jobs] == ["1-x-a-b", "2-x-a-b"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    for again in ("m/", "./m", str(tmp_path / "m")):
        with pytest.raises(UserError, match="is given twice"):
            Settings("x", ("m", again))


def test_help_teaches():
    done = subprocess.run(
        [Path(sys.executable).with_name("ssmax"), "evaluate", "--help"], capture_output=True, text=True, check=True
    )
    for word in (
        "MODEL",
        "(default: 4)",
        "--theta-factor",
        "--rope",
        "--tasks",
        "several",
        "--chunk",
        "continues an interrupted run",
    ):
        assert word in done.stdout
