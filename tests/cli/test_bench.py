"""ssmax bench: what is wrong gets no speed, ratios are those of the rounds, the formulae hold, the command teaches."""

import itertools
import math
import subprocess
import sys
import time

import pytest
import torch
from command_line import run
from plain_bytes import byte_tokenizer
from tiny_models import tiny_model

from ssmax import SSMaxScale, attention
from ssmax.bench import blocks, cases, command, generate, measure
from ssmax.bench.measure import PLAIN, Case, Comparison, compare
from ssmax.bench.scale import Shape
from ssmax.errors import UserError
from ssmax.hf import sharp_cache
from ssmax.runs.rows import read_rows


def metrics(rows, contender):
    return {row.metric: row for row in rows if row.variant == contender}


def test_the_profiler_prints_nothing():
    code = "import torch; from ssmax.bench.measure import peak_memory; print(peak_memory(lambda: torch.ones(1000)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 4000
    assert "profiler" not in done.stderr


def test_a_wrong_contender_gets_an_error_and_no_speed():
    calls = []
    comparison = Comparison(
        {"length": 8},
        {PLAIN: lambda: None, "right": lambda: None, "wrong": lambda: calls.append(1), "nan": lambda: calls.append(1)},
        4,
        {"right": lambda: 1e-7, "wrong": lambda: 0.5, "nan": lambda: math.inf},
    )
    rows = list(compare(comparison))
    assert not calls
    assert metrics(rows, "right").keys() == {"error", "seconds", "time_ratio", "cpu_ratio"}
    assert metrics(rows, "wrong").keys() == metrics(rows, "nan").keys() == {"error"}
    shown = command.table(rows)
    assert "wrong                     WRONG: error 5.0e-01, allowed 1.0e-05; no speed" in shown
    assert "right" in shown
    assert not list(compare(Comparison({}, {PLAIN: lambda: None, "a": lambda: None}, 3, {PLAIN: lambda: 1.0})))[1:]


def test_times_are_those_of_the_calls_and_ratios_those_of_the_rounds(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: 3 * clock[0])
    turn = itertools.count()

    def takes(seconds):
        def call():
            clock[0] += seconds * (10 if next(turn) // 2 == 2 else 1)  # one round is slowed down as a whole

        return call

    rows = list(compare(Comparison({}, {PLAIN: takes(2.0), "half": takes(1.0)}, 5)))
    assert metrics(rows, PLAIN)["seconds"].value == 2.0
    assert metrics(rows, "half")["seconds"].value == 1.0
    ratio = metrics(rows, "half")["time_ratio"]
    assert (ratio.value, ratio.at["low"], ratio.at["high"], ratio.samples) == (0.5, 0.5, 0.5, 5)
    assert metrics(rows, "half")["cpu_ratio"].value == 0.5


def test_memory_is_what_a_call_holds_at_its_peak():
    comparison = Comparison(
        {}, {PLAIN: lambda: torch.empty(2**20), "more": lambda: torch.empty(3, 2**20)}, 2, memory=True
    )
    rows = list(compare(comparison))
    assert metrics(rows, PLAIN)["peak_bytes"].value == 2**22
    assert metrics(rows, "more")["peak_bytes"].value == 3 * 2**22


def test_the_cases_compare_what_they_time(monkeypatch):
    """Every contender of a case is right here except where it is put wrong, and then it is caught."""
    first = next(cases.causal_attention())
    assert set(first.contenders) >= {PLAIN, "ssmax", "materialised"}
    for name, error in first.errors.items():
        if name != "ssmax, flex":  # seconds of compiling
            assert 0 < error() <= first.allowed
    monkeypatch.setattr(cases, "attention", lambda q, k, v, s, **options: attention(q, k, v, 1.01 * s, **options))
    one_percent = next(cases.causal_attention()).errors["materialised"]
    assert one_percent() > first.allowed


def test_the_command_lists_refuses_and_measures(tmp_path, monkeypatch, capsys):
    assert run("bench", "nonsense").stderr.startswith("ssmax: there is no case 'nonsense'; cases are attention, decode")
    listed = run("bench", "decode", "--dry-run", "--out", tmp_path / "x")
    assert listed.returncode == 0
    assert "about 3 min" in listed.stdout
    assert not (tmp_path / "x").exists()
    monkeypatch.setitem(command.NEEDS, "model", "no_such_package")
    with pytest.raises(UserError, match="needs the package 'no_such_package': pip install no-such-package"):
        command.bench(["model"], tmp_path, dry_run=False)
    scale = SSMaxScale(2)
    call = {PLAIN: lambda: None, "ssmax": lambda: scale(torch.ones(1, 2, 3, 4), 3)}
    tiny = Case(
        "a scale", 0.1, lambda: iter([Comparison({"length": 3}, call, 3), measure.row("x", "ssmax", {}, 1.0, 1)])
    )
    monkeypatch.setitem(command.CASES, "tiny", tiny)
    command.bench(["tiny"], tmp_path, dry_run=False)
    assert "tiny: a scale; about 0.1 min\nlength 3\n    plain" in capsys.readouterr().out
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert {row.metric for row in read_rows(tmp_path / "tiny.jsonl")} == {"seconds", "time_ratio", "cpu_ratio", "x"}


def test_generate_measures_models_with_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "STEPS", 3)
    monkeypatch.setattr(generate, "ROUNDS", 2)
    monkeypatch.setattr(sharp_cache, "TRIAL", 4)
    model = tiny_model("exaone4", num_hidden_layers=4, sliding_window=16, sliding_window_pattern=4, vocab_size=256)
    assert {"sliding_attention", "full_attention"} == set(model.config.layer_types)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = list(generate.measurements(tmp_path / "model", (10, 100), (1,)))
    equal = {(row.variant, row.at["context"]): row.value for row in rows if row.metric == "equal_tokens"}
    assert equal == {(name, n): 1.0 for name in ("SharpCache", "StaticCache") for n in (10, 100)}


def test_generate_says_what_each_layer_reads_and_leaves_the_caches_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(sharp_cache, "TRIAL", 2)
    monkeypatch.setattr(generate, "STEPS", 3)
    monkeypatch.setattr(generate, "ROUNDS", 2)
    lengths = []
    original = generate._generate

    def watched(model, prompt, cache, steps):
        spoken = original(model, prompt, cache, steps)
        lengths.append(int(cache.get_seq_length()))
        assert spoken.shape == (2, steps)
        return spoken

    monkeypatch.setattr(generate, "_generate", watched)
    rows = list(generate.measurements(None, (4100,), (2,)))
    assert set(lengths) == {4099}
    assert {row.variant for row in rows if row.metric == "seconds"} == {
        "DynamicCache", "StaticCache", "SharpCache", "without SSMax, DynamicCache", "without SSMax, StaticCache",
    }  # fmt: skip
    ours = metrics(rows, "SharpCache")
    assert ours["tokens_per_second"].value == pytest.approx(2 * 3 / ours["seconds"].value)
    assert 0 <= ours["equal_tokens"].value <= 1
    shares = [row for row in rows if row.metric == "share_of_keys_read"]
    assert [row.at["layer"] for row in shares] == [0, 1]
    for row in shares:
        assert len(row.at["heads"]) == 4
        assert row.value == pytest.approx(sum(row.at["heads"]) / 4, abs=1e-4)
        assert row.at["kind"] == ("sharp" if row.value <= sharp_cache.MOST_READ else "plain")
    assert "share of keys read" in command.table(rows)
    with pytest.raises(UserError, match="--batches must be 1 or more, got 0"):
        list(generate.measurements(None, (4100,), (0,)))
    with pytest.raises(UserError, match="--contexts is an option of the case generate"):
        command.bench(["decode"], tmp_path, dry_run=True, contexts=(1,))


def test_a_block_of_keys_is_needed_where_some_row_needs_it():
    scores = torch.full((1, 2, 256), -100.0)  # four blocks of 64 keys
    scores[0, 0, 10], scores[0, 1, 70] = 0.0, 0.0
    scores[0, 0, 255] = 50.0  # hidden from the first row
    assert blocks.needed(scores).tolist() == [0.5]
    scores[0, 1, 200] = -12.0  # below the largest by less than log(256 / tolerance) = 12.45
    assert blocks.needed(scores).tolist() == [0.75]
    scores[0, 1, 200] = -13.0
    assert blocks.needed(scores).tolist() == [0.5]


def test_the_kernel_case_needs_a_gpu_and_is_left_out_where_it_is_not_named(tmp_path, capsys):
    command.bench([], tmp_path, dry_run=True)
    assert "kernel" not in capsys.readouterr().out
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"needs a GPU.*--dry-run compiles"):
            command.bench(["kernel"], tmp_path, dry_run=False)


def test_formulae_by_hand():
    one = Shape(layers=1, width=4, heads=2, key_heads=1, size=2, hidden=3, vocabulary=5, number=2)
    assert one.multiplied == 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 3 + 4 * 5  # q, k and v, o, feed-forward, output
    assert one.forward_flops(3) == 2 * one.multiplied * 3 + 4 * 2 * 2 * (1 + 2 + 3)
    assert one.training_flops(3) == 3 * 2 * one.multiplied * 3 + 3.5 * 4 * 2 * 2 * 6
    assert one.cache_bytes(7) == 2 * 2 * 7 * 2
    assert one.sharp_decode_bytes(7, 0.5) == one.multiplied * 2 + 2 * 7 + one.cache_bytes(7) // 2
    assert one.ring_bytes(8, 4) == 3 * (2 * 1 * 2 * (8 // 4) * 2)  # three blocks of keys and values go by
    assert one.ulysses_bytes(8, 2) == 2 * (2 + 1) * 2 * 4 * 2 // 2  # half of q, o, k, v of 4 tokens
    assert one.scale_bytes(2) == 4 * 2  # two heads, half out and half back
    assert 8.0e9 < Shape().parameters < 8.1e9  # Llama 3's own figure
