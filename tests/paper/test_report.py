import base64
import dataclasses
import json
import math
import re

import numpy as np
import pytest

from ssmax.paper import figures, report
from ssmax.paper.claims import HOLDS, HOLDS_NOT, OPEN, headlines, verdict
from ssmax.paper.figures.learned_p import law_fits
from ssmax.paper.recipes import smoke
from ssmax.plots.statistics import Paired
from ssmax.runs.rows import Row, read_rows, write_rows


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((0.3, 0.4, 0.2), HOLDS),
        ((-0.3, -0.4, -0.2), HOLDS_NOT),
        ((0.3, -0.1, 0.2), OPEN),
        ((0.01, 0.9, 0.01), OPEN),
        ((0.5,), OPEN),
        ((0.0, 0.0), OPEN),
    ],
)
def test_verdicts_need_agreeing_seeds_and_a_difference_beyond_its_spread(differences, expected):
    assert verdict(Paired(differences)) == expected


def test_rows_survive_the_file_and_damage_is_named(tmp_path):
    rows = [Row("train_loss", "a", 0, {"step": 1}, 0.1 + 0.2, 1, {"commit": None})]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows, checked=True)
    assert read_rows(path) == rows
    before = path.stat().st_mtime_ns
    write_rows(path, rows)
    assert path.stat().st_mtime_ns == before
    path.write_text(path.read_text() + '{"metric": "tra')
    with pytest.raises(ValueError, match=r"rows.jsonl is damaged: .*sha256"):
        read_rows(path)
    path.with_name("rows.jsonl.sha256").unlink()
    with pytest.raises(ValueError, match="line 2"):
        read_rows(path)
    with pytest.raises(ValueError, match=r"train_loss of a at .* is nan"):
        write_rows(path, [dataclasses.replace(rows[0], value=float("nan"))])


def made_up_rows(better):
    """Rows of a run in which SSMax is better by a known amount (or worse, for a negative one)."""
    rows = []
    for variant in "ab":
        gain = better if variant == "b" else 0.0
        s = None if variant == "a" else 0.43
        rows += [Row("max_weight", variant, None, {"n": n, "s": s}, 0.1 if variant == "a" else 0.9, 1) for n in (2, 64)]
        for n in (100, 1_000, 10_000, 100_000):
            for z in range(15):
                lead = 3 if variant == "b" else 3 + n / 2e4
                rows.append(Row("focus_weight", variant, None, {"n": n, "z_max": z, "s": s}, float(z > lead), 1))
                if variant == "b":
                    rows.append(Row("focus_weight", "b", None, {"n": n, "z_max": z, "s": 1.0}, float(z > 1), 1))
        for seed in (0, 1, 2):
            at = {"form": "paper"}
            jitter = seed / 1000 * (1 + gain)
            for step in (10, 20):
                rows.append(
                    Row("train_loss", variant, seed, at | {"stage": "pretrain", "step": step}, 3 - gain + jitter, 1)
                )
            for position in (8, 16, 128, 256):
                for factor in (1, 50):
                    place = at | {"position": position, "from": position // 2 + 1, "theta_factor": factor}
                    value = 3 + (0 if position <= 16 else 1 - gain) + jitter
                    rows.append(Row("loss_by_position", variant, seed, place, value, 4))
            for length in (16, 128):
                place = at | {"length": length, "depth": 0.5, "theta_factor": 1 if length == 16 else 50}
                found = 0.95 if length == 16 else 0.5 + gain / 2 + jitter
                rows.append(Row("retrieval_accuracy", variant, seed, place, found, 20))
            place = at | {"length": 128, "depth": 0.5, "theta_factor": 50}
            for head in range(3):
                score = 0.4 + gain / 4 - head / 10 + jitter
                rows.append(Row("needle_score", variant, seed, place | {"layer": 0, "head": head}, score, 4))
            for length in (8, 16, 32):
                place_n = at | {"length": length, "theta_factor": 1}
                rows.append(Row("counting_accuracy", variant, seed, place_n, 0.6 - gain / 4 + jitter, 20))
            for trial in range(6):
                ok = trial % 2 == 0
                value = 0.5 + (0.2 if ok else -0.2) + gain / 10 + jitter
                rows.append(Row("top_needle_score", variant, seed, place | {"trial": trial, "correct": ok}, value, 1))
    return rows


@pytest.mark.parametrize(("better", "expected"), [(0.5, HOLDS), (-0.5, HOLDS_NOT)])
def test_claims_follow_the_rows(better, expected):
    found = figures.claims(made_up_rows(better), train_length=16)
    comparisons = [claim for claim in found if claim.figure in (4, 5, 6, 7) or claim.name == "top-score"]
    assert [claim.name for claim in comparisons] == ["faster", "lower", "far", "rise", "needles", "head", "top-score"]
    assert {claim.verdict for claim in comparisons} == {expected}
    assert next(claim for claim in found if claim.figure == "counting").verdict == expected
    assert {claim.verdict for claim in found if claim.figure in (1, 3) or claim.name == "score"} == {HOLDS}
    loss = next(claim for claim in found if claim.figure == 4)
    assert "Softmax 3.001 ± 0.001" in loss.measured
    difference = float(re.search(r"difference ([+-][\d.]+), 95 % interval", loss.measured)[1])
    assert difference == pytest.approx(-better + better / 1000, abs=1e-3)


def test_other_seeds_of_the_recipe_count_and_its_own_do_not():
    def half(**stored):
        known = {("paper", "far"): {int(seed.strip("s")): value for seed, value in stored.items()}}
        claim = next(claim for claim in figures.claims(made_up_rows(0.5), 16, known) if claim.name == "far")
        return claim.paired.mean, np.ptp(claim.paired.interval) / 2

    mean, alone = half()
    assert half(s0=7.0, s1=9.0) == (mean, alone)
    assert half(s7=0.0, s8=1.0)[0] == mean
    assert half(s7=0.0, s8=1.0)[1] > alone > half(s7=0.0, s8=0.0, s9=0.0)[1]


@pytest.mark.parametrize(
    ("gamma", "expected"), [((0.9, 0.95, 1.2), HOLDS), ((0.2, 0.1, 0.3), HOLDS_NOT), ((0.4, 0.6, 0.5), OPEN)]
)
def test_the_learned_exponent_is_judged_between_no_n_and_log_n(gamma, expected):
    rows = [
        Row("learned_scale", "g", seed, {"form": "paper", "layer": 0, "head": head, "name": name}, value + off, 1)
        for seed, value in enumerate(gamma)
        for head, off in ((0, -0.05), (1, 0.05))
        for name in ("gamma", "s")
    ]
    found = next(claim for claim in figures.claims(rows, 16) if claim.name == "law-exponent")
    assert found.verdict == expected
    assert found.paired.seeds == 3
    assert figures.FIGURES["laws"].draw(rows, 16).axes[0].get_title() == "gamma"


def test_models_that_did_not_learn_the_task_are_left_out_and_counted():
    def needles(share):
        rows = [
            dataclasses.replace(row, value=share(row.variant, row.seed))
            if row.metric == "retrieval_accuracy" and row.at["length"] == 16
            else row
            for row in made_up_rows(0.5)
        ]
        return next(claim for claim in figures.claims(rows, 16) if claim.name == "needles")

    some = needles(lambda variant, seed: 0.89 if (variant, seed) == ("a", 1) else 0.9)
    assert some.paired.seeds == 2
    assert some.verdict == HOLDS
    assert "1 of 6 models did not learn the task" in some.measured
    none = needles(lambda variant, seed: 0.5)
    assert none.verdict == OPEN
    assert "6 of 6 models did not learn the task" in none.measured


def test_without_a_measure_at_the_trained_theta_all_models_take_part():
    rows = [row for row in made_up_rows(0.5) if row.metric != "retrieval_accuracy" or row.at["length"] != 16]
    needles = next(claim for claim in figures.claims(rows, 16) if claim.name == "needles")
    assert needles.paired.seeds == 3


def test_a_headline_without_anything_to_compare_says_so():
    far = [
        dataclasses.replace(row, at=row.at | {"length": 256}, value=row.value)
        for row in made_up_rows(0.5)
        if row.metric == "retrieval_accuracy" and row.at["length"] == 128
    ]
    rows = [dataclasses.replace(r, value=0.5) if r.metric == "retrieval_accuracy" else r for r in made_up_rows(0.5)]
    found = figures.claims([*rows, *far], 16)
    line = next(line for line in headlines(found) if line.title == "Key information retrieval")
    assert line.words.startswith("Nothing to compare; 6 of 6 models did not learn the task")
    assert "nan" not in report.claims_text(found, 100)


def other_models(far, short, late):
    """Rows of the other variants: far = loss past 8 x of c, d, e, f; short = loss of e within the training length."""
    rows = made_up_rows(0.5)
    for variant, value in far.items():
        for seed in (0, 1, 2):
            at = {"form": "paper", "theta_factor": 50}
            jitter = seed / 1000
            rows.append(Row("loss_by_position", variant, seed, at | {"position": 16, "from": 9}, short + jitter, 4))
            rows.append(Row("loss_by_position", variant, seed, at | {"position": 256, "from": 129}, value + jitter, 4))
            train = {"form": "paper", "stage": "pretrain", "step": 20}
            rows.append(Row("train_loss", variant, seed, train, late[variant] + jitter, 1))
    return rows


def test_claims_of_the_other_models():
    # Softmax is at 3 within the training length and at 4 far beyond, SSMax at 3 and 3.5; training losses 3 and 2.5.
    fair = other_models(
        {"c": 3.6, "d": 3.7, "e": 3.8, "f": 3.55}, short=3.2, late={"c": 2.52, "d": 2.4, "e": 3.0, "f": 2.6}
    )
    found = {claim.claim: claim.verdict for claim in figures.claims(fair, 16) if claim.figure in (4, 5)}
    assert len(found) == 13
    assert set(found.values()) == {HOLDS}
    foul = other_models(
        {"c": 4.1, "d": 3.4, "e": 4.2, "f": 4.1}, short=2.9, late={"c": 3.2, "d": 2.6, "e": 3.0, "f": 2.6}
    )
    against = {claim.claim: claim.verdict for claim in figures.claims(foul, 16) if claim.figure in (4, 5)}
    ours = {
        name
        for name in found
        if "SSMax ends pretraining" in name
        or "falls faster" in name
        or "SSMax's loss is lower" in name
        or "rises less" in name
    }
    assert {name for name, word in against.items() if word == HOLDS} == ours
    assert {word for name, word in against.items() if name not in ours} == {HOLDS_NOT}


def test_the_learned_law_is_fitted_without_its_untrained_ends():
    def rows(p):
        return [
            Row("learned_p", "p", seed, {"form": "paper", "n": n}, p(n) + seed / 100, 1)
            for seed in (0, 1)
            for n in range(1, 17)
        ]

    ends = {1: 1.0, 16: 1.0}
    log = figures.claims([*made_up_rows(0.5), *rows(lambda n: ends.get(n, 0.2 * math.log(n) + 0.4))], 16)
    claim = next(claim for claim in log if claim.figure == 2)
    assert claim.verdict == HOLDS
    assert "R² of a1 log n + a2: 1.000 ± 0.000" in claim.measured
    line = figures.claims([*made_up_rows(0.5), *rows(lambda n: 0.1 * n + (n % 2) / 10)], 16)
    assert next(claim for claim in line if claim.figure == 2).verdict == HOLDS_NOT
    fit = law_fits([2, 4, 8], np.array([1.0, 2.0, 3.0]))["log"]
    assert fit.formula == f"{1 / math.log(2):.3f} log n + 0.000"
    assert fit.r2 == pytest.approx(1)


@pytest.fixture
def run(tmp_path):
    recipe = dataclasses.asdict(dataclasses.replace(smoke(), name="<b>", train_length=16, steps=23_456))
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": recipe, "corpus": "</pre><script>alert(1)</script>"}))
    evil = {
        "recipe": "<img src=x onerror=alert(1)>",
        "corpus": "a'\"><script>",
        "machine": "<iframe srcdoc=x>",
        "<i>": "&",
    }
    rows = [dataclasses.replace(row, provenance=evil) for row in made_up_rows(0.5)]
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path


def test_the_report_is_whole_offline_and_escaped(run):
    report.build(run)
    page = (run / "report.html").read_text()
    images = re.findall(r"src='data:image/svg\+xml;base64,([^']+)'", page)
    assert len(images) == 8
    assert all(b"<svg" in base64.b64decode(image) for image in images)
    assert not re.search(r"(?:src|href)=['\"]?(?:https?:)?//", page)
    for word in ("<script", "<img src=x", "<iframe", "<b>", "<i>"):
        assert word not in page
    for word in ("&lt;b&gt;", "&lt;img src=x onerror=alert(1)&gt;", "&lt;/pre&gt;&lt;script&gt;", "&lt;i&gt; &amp;"):
        assert word in page
    for words in ("Table 1. Model", "Table 2. Pretraining", "Table 3. Fine-tuning", "50,257", "23,456"):
        assert words in page
    drawn = figures.drawable(made_up_rows(0.5))
    assert {1, 3, 4, 5, 6, 7, 8, "counting"} <= set(drawn)
    assert {path.name for path in (run / "figures").iterdir()} == {
        f"{figures.FIGURES[name].file_name}.{kind}" for name in drawn for kind in ("png", "svg")
    }
    for claim in figures.claims(made_up_rows(0.5), 16):
        assert claim.verdict in page


def test_the_report_opens_with_the_abstract(run):
    report.build(run)
    page = (run / "report.html").read_text()
    found = figures.claims(made_up_rows(0.5), 16)
    lines = headlines(found)
    assert [line.title for line in lines] == [
        "Faster loss reduction", "Better at long context", "Attention on key information"
    ]  # fmt: skip
    assert page.index("What the abstract claims") < page.index(lines[0].words) < page.index("All claims")
    # Softmax ends at 4.001 nats and SSMax at 3.501, up to the seeds' jitter; each line has its interval.
    assert re.search(r"SSMax's loss is 3\.50\d nats, Softmax's 4\.00\d", lines[1].words)
    assert re.search(
        r"Difference -0\.\d+, 95 % interval -0\.\d+ to -0\.\d+ \(3 seeds, d -\d+\.\d\)\. Figure 5, paper", page
    )


def test_the_bootstrap_over_texts_counts_seeds():
    def texts(gaps):
        return [
            Row("text_loss", variant, seed, {"form": "paper", "from": 129, "position": 256, "text": i}, value, 128)
            for seed, gap in enumerate(gaps)
            for variant in "ab"
            for i, value in enumerate(4 - gap * (variant == "b") + 0.01 * np.arange(12) * (variant == "b"))
        ]

    claim = next(c for c in figures.claims([*made_up_rows(0.5), *texts((0.5, 0.5, 0.05))], 16) if c.name == "far")
    assert "over texts (bootstrap) below zero in 2 of 3 seeds" in claim.measured


def test_figures_made_twice_are_the_same_files(run):
    made = []
    for _ in range(2):
        report.build(run)
        made.append({path.name: path.read_bytes() for path in (run / "figures").iterdir()})
        (run / "report.html").unlink()
    assert made[0] == made[1]
    assert len(made[0]) > 8


def test_an_unchanged_report_is_left_alone_and_other_rows_make_another(run):
    report.build(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    report.build(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    write_rows(run / "rows.jsonl", made_up_rows(0.4))
    page = (run / "report.html").read_text()
    report.build(run)
    assert (run / "report.html").read_text() != page


def test_the_terminal_table_fits_and_keeps_every_claim():
    found = figures.claims(made_up_rows(0.5), 16)
    for width in (1, 60, 100, 200):
        text = report.claims_text(found, width)
        assert max(map(len, text.splitlines())) <= max(width, 40)
        assert text.count("holds") == len(found) + len(headlines(found))
