"""The command line as a person meets it: real processes, real signals, real files."""

import dataclasses
import errno
import json
import os
import random
import re
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from command_line import SSMAX, run
from faults import PATIENCE, Forks, wait_for

import ssmax
from ssmax import cli
from ssmax.laws import LAWS
from ssmax.paper import figures
from ssmax.paper.recipes import RECIPES, Recipe, smoke
from ssmax.runs.folder import versions
from ssmax.runs.rows import read_rows

GOLDEN = Path(__file__).parent.parent / "golden" / "smoke.json"
WORDS = [
    f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "pu", "ra", "so", "ti") for b in ("bar", "den", "fil", "gor", "hum")
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text that is the same everywhere: sentences with some structure, 40 documents."""
    root = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    for i in range(40):
        topic = rng.sample(WORDS, 8)
        words = [rng.choice(topic) if rng.random() < 0.8 else rng.choice(WORDS) for _ in range(700)]
        (root / f"{i:02}.txt").write_text(". ".join(" ".join(words[j : j + 7]) for j in range(0, 700, 7)))
    return root


def values(folder):
    return [
        (row.metric, row.variant, row.seed, row.at, row.value, row.samples) for row in read_rows(folder / "rows.jsonl")
    ]


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Real processes, forked from one that has loaded torch and transformers once."""
    started = Forks(tmp_path_factory.mktemp("forks"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    done = run("reproduce", "smoke", "--corpus", corpus, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_it_leaves_rows_figures_a_report_and_a_table(finished):
    folder, done = finished
    metrics = {row.metric for row in read_rows(folder / "rows.jsonl")}
    assert metrics == {
        "max_weight", "focus_weight", "learned_p", "train_loss", "loss_by_position", "text_loss", "retrieval_accuracy",
        "needle_score", "top_needle_score", "counting_accuracy", "learned_scale", "scale_parameters",
    }  # fmt: skip
    for row in read_rows(folder / "rows.jsonl"):
        assert {"recipe", "commit", "torch", "transformers", "time"} <= row.provenance.keys()
        assert (row.seed is None) == (row.metric in ("max_weight", "focus_weight"))
    shown, settings = figures.drawable(read_rows(folder / "rows.jsonl")), smoke()
    assert {1, 2, 3, 4, 5, 6, 7, 8, "counting"} <= set(shown)
    names = {f"{figures.FIGURES[name].file_name}.{kind}" for name in shown for kind in ("png", "svg")}
    assert {path.name for path in (folder / "figures").iterdir()} == names
    found = figures.claims(read_rows(folder / "rows.jsonl"), settings.train_length)
    assert done.stdout.count("Fig. ") == sum(isinstance(claim.figure, int) for claim in found) > 10
    assert str(folder / "report.html") in done.stdout
    assert "Traceback" not in done.stderr


def test_the_same_seed_gives_the_golden_losses(finished):
    got = {
        f"{variant} {at['stage']} {at['step']}": value
        for metric, variant, _, at, value, _ in values(finished[0])
        if metric == "train_loss" and at["step"] % 5 == 0
    }
    assert got == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)


@pytest.fixture
def older(corpus, tmp_path):
    """A run of smoke as commit c4194ad left it, without its models, beside its corpus."""
    with tarfile.open(GOLDEN.with_name("run.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "texts").symlink_to(corpus)
    return tmp_path


def test_a_run_of_an_older_version_is_reported(older):
    before = values(older / "run")
    done = run("reproduce", "smoke", "--corpus", "texts", "--out", "run", cwd=older)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Fig. ") > 10
    assert "Figure 6" in (older / "run" / "report.html").read_text()
    assert values(older / "run") == before


def test_a_run_that_an_older_version_began_is_continued(older):
    folder = older / "run"
    want = values(folder)
    for lost in (*folder.glob("rows.*"), *folder.glob("stages/paper-c-0.*")):
        lost.unlink()
    settings = json.loads((folder / "recipe.json").read_text())
    settings["versions"] = versions()  # a run may not mix versions of torch, and this one may be another
    (folder / "recipe.json").write_text(json.dumps(settings))
    done = run("reproduce", "smoke", "--corpus", "texts", "--out", "run", cwd=older)
    assert done.returncode == 0, done.stderr
    got = {str(row[:4]): row[4] for row in values(folder)}
    kept = {str(row[:4]): row[4] for row in want if row[1] != "c"}
    trained = {
        str(row[:4]): row[4] for row in want if row[:2] == ("train_loss", "c")
    }  # other rows of c are others today
    assert len(trained) > 10
    assert {name: got[name] for name in kept} == kept
    assert {name: got[name] for name in trained} == pytest.approx(trained, rel=1e-3)


def test_running_it_again_makes_nothing_anew(finished, corpus):
    folder, done = finished
    before = snapshot(folder)
    again = run("reproduce", "smoke", "--corpus", corpus, "--out", folder)
    assert again.returncode == 0
    assert again.stdout == done.stdout
    assert snapshot(folder) == before


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize(("number", "stage"), [(signal.SIGKILL, "pretrain"), (signal.SIGINT, "finetune")])
def test_a_killed_run_continues_to_the_same_rows(number, stage, finished, corpus, tmp_path):
    command = [SSMAX, "reproduce", "smoke", "--corpus", str(corpus), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job ignores Ctrl-C, and so would its children; the person at the terminal is no such job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: list(tmp_path.glob(f"run/stages/*.{stage}.jsonl")), process)
    workers = children(process.pid)
    stages = snapshot(tmp_path / "run" / "stages")
    kept = {path: content for path, content in stages.items() if not path.name.startswith(".")}  # half-written ones go
    (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
    _, stderr = process.communicate(timeout=PATIENCE)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped by SIGINT; the same command continues" in stderr
        assert "Traceback" not in stderr
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived the run"
        time.sleep(0.05)
    (tmp_path / "run" / "stages" / ".half.jsonl.1.tmp").write_text('{"half')
    (tmp_path / "run" / "models" / ".half.1.tmp").mkdir(parents=True)
    (tmp_path / "run" / "models" / ".half.1.tmp" / ".half.py.1.tmp").write_text("half of a file in half of a folder")
    again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0, again.stderr
    after = snapshot(tmp_path / "run" / "stages")
    assert all(after[path] == content for path, content in kept.items())
    assert values(tmp_path / "run") == values(finished[0])
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_two_runs_in_one_folder(corpus, tmp_path):
    command = [SSMAX, "reproduce", "smoke", "--corpus", str(corpus), "--out", str(tmp_path / "run")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "run" / "recipe.json").exists, first)
    first.send_signal(signal.SIGSTOP)  # it keeps its lock, and does not end before the second has begun
    second = run(*command[1:])
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert "another process runs in" in second.stderr


def one_line(done, status, *words):
    assert done.returncode == status, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_another_configuration_is_refused_and_the_old_one_kept(finished, corpus):
    folder = finished[0]
    before = snapshot(folder)
    one_line(
        run("reproduce", "smoke", "--corpus", corpus, "--out", folder, "--steps", 31), 2, "steps was 30, is 31", "--out"
    )
    one_line(run("reproduce", "tiny", "--corpus", corpus, "--out", folder), 2, "another configuration")
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["huge"], ["no recipe 'huge'", "tiny"]),
        (["smoke", "--corpus", "{tmp}/nothing.txt"], ["does not exist"]),
        (["smoke", "--corpus", "{tmp}/empty.txt"], ["holds no text"]),
        (["smoke", "--corpus", "{tmp}/short.txt"], ["too short", "longer corpus"]),
        (["smoke", "--corpus", "{tmp}/folder"], ["holds no text"]),
        (["smoke", "--steps", "0"], ["--steps", "positive"]),
        (["smoke", "--train-length", "20"], ["--train-length"]),
        (["smoke", "--seeds", "-1"], ["--seeds"]),
        (["smoke", "--seeds", "99999999999999999999"], ["--seeds", "0 to 9.2"]),
        (["smoke", "--theta", "inf"], ["--theta"]),
        (["smoke", "--models", "paper:be"], ["e is made of a"]),
        (["smoke", "--models", "llama"], ["FORM:LETTERS"]),
    ],
)
def test_bad_input_is_one_clear_line(arguments, words, forks, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "folder").mkdir()
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    one_line(forks.completed("reproduce", *arguments, "--out", tmp_path / "out"), 2, *words)


@pytest.mark.parametrize(
    ("arguments", "value", "right"),
    [
        (["reproduce", "--counting", "tiny"], "tiny", "reproduce tiny --counting"),
        (["reproduce", "--models", "paper:ab", "smoke"], "smoke", "reproduce smoke --models"),
        (["prepare", "--seeds", "0", "1", "smoke", "--corpus", "x"], "smoke", "prepare smoke --seeds"),
        (["evaluate", "--sizes", "64", "128", "model"], "model", "evaluate model --sizes"),
        (["evaluate", "--tasks", "needle", "one", "two"], "one", "evaluate one two --tasks"),
        (["evaluate", "--theta_factor", "1", "--depths", "0.5", "model"], "model", "evaluate model --depths"),
        (["calibrate", "--layers", "0", "1", "model", "new"], "model", "calibrate model new --layers"),
        (["calibrate", "--inits", "0.5", "matched", "model", "new"], "model", "calibrate model new --inits"),
        (["convert", "--layers", "1", "model"], "model", "convert model --layers"),
        (["train", "--depths", "0.5", "1.0", "runs/mine"], "runs/mine", "train runs/mine --depths"),
    ],
)
def test_an_option_of_several_values_that_took_what_follows(arguments, value, right, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(arguments)
    assert status.value.code == 2
    option = right.split()[-1]
    meant = {"reproduce": "recipe", "prepare": "recipe", "evaluate": "model", "train": "out"}.get(
        arguments[0], "source"
    )
    assert capsys.readouterr().err == (
        f"ssmax: {option} took {value!r} as one of its values; put the {meant} first: ssmax {right} ...\n"
    )


def test_a_wrong_value_after_the_model_is_wrong_itself(capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["evaluate", "model", "--tasks", "neddle"])
    assert status.value.code == 2
    told = capsys.readouterr().err
    assert "needle" in told
    assert "put the model first" not in told


def test_a_folder_that_is_no_run_keeps_its_files(forks, tmp_path):
    files = [".draft.tmp", "deep/.cache.tmp/data", "deep/.half.7.tmp"]
    for name in files:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("precious")
    command = ["reproduce", "smoke", "--corpus", tmp_path / "nothing.txt", "--out", tmp_path / "out"]
    one_line(forks.completed(*command), 2, "does not exist")
    (tmp_path / "out" / "rows.jsonl").write_text("precious")
    one_line(forks.completed(*command), 2, "rows.jsonl exists, and is not of a run of this folder; give another --out")
    assert all((tmp_path / "out" / name).read_text() == "precious" for name in [*files, "rows.jsonl"])
    (tmp_path / "out" / "rows.jsonl").unlink()
    (tmp_path / "out" / "model").mkdir()
    command = ["train", tmp_path / "out", "--recipe", "smoke", "--corpus", tmp_path / "nothing.txt"]
    one_line(forks.completed(*command), 2, "model exists already")
    one_line(forks.completed(*command, "--timeout-minutes", "nan"), 2, "--timeout-minutes must be positive")


@pytest.mark.parametrize("arguments", [["reproduce", "--help"], ["huge"], ["reproduce", "smoke", "--dry-run"]])
def test_a_reader_that_goes_away_is_no_error(arguments, tmp_path):
    told = tmp_path / "told"
    with told.open("wb") as file:
        errors = subprocess.STDOUT if arguments == ["huge"] else file
        with subprocess.Popen([SSMAX, *arguments], stdout=subprocess.PIPE, stderr=errors, cwd=tmp_path) as process:
            process.stdout.close()
            assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    assert told.read_bytes() == b""


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    one_line(run("reproduce", "smoke", "--out", tmp_path / "file" / "run"), 2, "Not a directory")


def test_a_full_disk_is_a_failed_run(monkeypatch, capsys, corpus, tmp_path):
    from ssmax import cli
    from ssmax.runs import files

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SystemExit) as status:
        cli.main(["reproduce", "smoke", "--corpus", str(corpus), "--out", str(tmp_path / "run")])
    assert status.value.code == 1
    assert "No space left on device" in capsys.readouterr().err


def test_a_loss_that_explodes_is_one_line_and_keeps_what_is_finished(corpus, tmp_path):
    done = run(
        "reproduce",
        "smoke",
        "--corpus",
        corpus,
        "--out",
        tmp_path / "run",
        "--learning-rate",
        "1e30",
        "--warmup-steps",
        "1",
    )
    assert done.returncode == 1
    assert "not finite" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "stages" / "formula.jsonl").exists()


def test_a_dry_run_writes_nothing(tmp_path):
    done = run("reproduce", "smoke", "--dry-run", "--out", tmp_path / "out", "--hidden-size", "64")
    assert done.returncode == 0, done.stderr
    for word in ("parameters", "tokens", "memory", "disk", "tokens a second", "nothing was written"):
        assert word in done.stdout
    trained = run("train", tmp_path / "out", "--recipe", "smoke", "--dry-run")
    assert "1 models, paper:b, seeds 0" in trained.stdout
    assert not (tmp_path / "out").exists()


def test_train_says_what_belongs_to_reproduce(tmp_path):
    one_line(
        run("train", tmp_path / "out", "--recipe", "smoke", "--seeds", "1"),
        2,
        "--seeds is an option of ssmax reproduce",
    )


def told(capsys, *arguments):
    """What a command prints before it ends, in words: tyro breaks lines where they fit into its boxes."""
    with pytest.raises(SystemExit) as status:
        cli.main(list(arguments))
    assert not status.value.code
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_version(capsys):
    assert told(capsys, "--version") == f"ssmax {ssmax.__version__}"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_help_has_an_example_that_parses(command, capsys):
    assert command in told(capsys, "--help")
    text = told(capsys, command, "--help")
    assert "None" not in text.replace("None:", "")
    example = re.search(rf"Example: ssmax ({command} .*)", cli.COMMANDS[command].__doc__)[1]
    assert example.strip() in text
    assert type(cli.parsed(example.split())) is cli.COMMANDS[command]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_help_shows_its_values(name, capsys):
    recipe = RECIPES[name]()
    for arguments in (
        ["reproduce", name, "--help"],
        ["prepare", "--help", name],
        ["train", "--recipe", name, "--help"],
    ):
        text = told(capsys, *arguments)
        for field in ("steps", "train_length", "learning_rate"):
            assert re.search(rf"--{field.replace('_', '-')} \w+ [^(]*\(default: {getattr(recipe, field)}\)", text)
        for group in ("architecture", "text", "pretraining", "fine-tuning", "measurement"):
            assert f"{group} options" in text


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_not_given_is_as_in_the_recipe(name):
    command = cli.parsed(["reproduce", "--out", "tiny", "--steps", "7", name])
    assert command.chosen() == dataclasses.replace(RECIPES[name](), steps=7)
    assert cli.parsed(["train", "tiny", f"--recipe={name}"]).chosen().hidden_size == RECIPES[name]().hidden_size


def test_help_teaches(capsys):
    text = told(capsys, "reproduce", "--help")
    for field in dataclasses.fields(Recipe):
        assert field.name == "name" or f"--{field.name.replace('_', '-')} " in text
    for word in ("tiny", "smoke", "--corpus", "--out", "--seeds", "continues an interrupted run"):
        assert word in text


def test_the_help_of_convert_names_every_law_that_convert_takes(capsys):
    text = told(capsys, "convert", "--help")
    assert [law for law in LAWS if not LAWS[law].instead and law not in text] == []
