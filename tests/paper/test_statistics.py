import dataclasses
import json
import math

import numpy as np
import pytest

from ssmax.paper.claims import HOLDS, HOLDS_NOT, OPEN, interval_words, verdict
from ssmax.paper.figures import FIGURES
from ssmax.paper.measured import MEASURES
from ssmax.paper.recipes import laptop, tiny
from ssmax.paper.registered import ABSTRACT, REGISTERED
from ssmax.paper.seeds import stored
from ssmax.plots.statistics import Paired, bootstrap, t_cdf, t_quantile


# Two-sided 95 % points of Student's t, as any table prints them.
@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045), (30, 2.042)],
)
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8])
def test_the_distribution_is_the_integral_of_its_density(freedom):
    t = np.linspace(0, 1.7, 20_001)
    log_norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(log_norm - (freedom + 1) / 2 * np.log1p(t**2 / freedom))
    assert t_cdf(1.7, freedom) == pytest.approx(0.5 + np.trapezoid(density, t), abs=1e-8)
    assert t_cdf(-1.7, freedom) == pytest.approx(1 - t_cdf(1.7, freedom), abs=1e-12)


def test_the_interval_holds_the_truth_in_95_of_100_runs():
    rng, draws = np.random.default_rng(0), 4000
    intervals = [Paired(tuple(rng.normal(0.3, 1.0, 3))).interval for _ in range(draws)]
    inside = np.mean([low < 0.3 < high for low, high in intervals])
    assert abs(inside - 0.95) < 4 * math.sqrt(0.95 * 0.05 / draws)


def test_stored_seeds_tell_about_the_deviation_and_not_about_the_mean():
    """The interval is narrower, for the same error rate, wherever the stored seeds' own mean is."""
    rng, draws = np.random.default_rng(0), 4000
    pairs = [Paired(tuple(rng.normal(0.3, 1.0, 3)), tuple(rng.normal(9.0, 1.0, 4))) for _ in range(draws)]
    inside = np.mean([low < 0.3 < high for low, high in (pair.interval for pair in pairs)])
    assert abs(inside - 0.95) < 4 * math.sqrt(0.95 * 0.05 / draws)
    width, alone = (
        np.mean([np.ptp(pair.interval) for pair in some]) for some in (pairs, [Paired(p.values) for p in pairs])
    )
    assert width < 0.75 * alone
    assert Paired((1.0, 3.0), (5.0,)).interval == Paired((1.0, 3.0)).interval
    low, high = Paired((1.0,), (4.0, 6.0)).interval  # one seed, and the deviation of two others
    assert high - 1 == pytest.approx(t_quantile(0.975, 1) * math.sqrt(2)) == 1 - low


def test_what_is_known_of_stored_seeds_is_of_the_same_recipe_and_text():
    recipe = json.loads(json.dumps(dataclasses.asdict(tiny())))
    known = stored(recipe, None)
    assert set(known["paper", "far"]) == {0, 1, 2, 3, 11, 12, 13}
    assert stored(recipe | {"seeds": [7], "models": ["paper:ab"], "name": "mine"}, None) == known
    assert not stored(recipe, "texts/")
    assert not stored(recipe | {"steps": 401}, None)
    assert not stored(json.loads(json.dumps(dataclasses.asdict(laptop()))), None)


def test_seeds_needed_is_the_first_number_whose_interval_leaves_zero():
    paired = Paired((0.1, -0.05, 0.02))
    needed = paired.seeds_needed

    def half(seeds):
        return t_quantile(0.975, seeds - 1) * paired.deviation / math.sqrt(seeds)

    assert half(needed) < paired.mean <= half(needed - 1)
    assert f"it takes about {needed} seeds" in interval_words(paired)
    assert Paired((1.0, -1.0)).seeds_needed is None
    assert Paired((1.0, -0.999)).seeds_needed is None  # above 1,000
    assert "no interval" in interval_words(Paired((0.5,)))


def test_a_verdict_needs_the_whole_interval_on_one_side():
    half = t_quantile(0.975, 2) / math.sqrt(3)  # of differences whose deviation is 1
    for mean, expected in ((half + 0.01, HOLDS), (half - 0.01, OPEN), (-half - 0.01, HOLDS_NOT), (-half + 0.01, OPEN)):
        assert verdict(Paired((mean - 1, mean, mean + 1))) == expected


def test_the_bootstrap_is_repeatable_and_as_wide_as_the_error_of_a_mean():
    values = np.random.default_rng(1).normal(1, 2, 400).tolist()
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values)
    error = np.std(values) / math.sqrt(400)
    # An end of 2,000 draws is off by sqrt(p (1 - p) / 2000) / density = 0.06 errors of the mean; four of them.
    assert low == pytest.approx(np.mean(values) - 1.96 * error, abs=0.24 * error)
    assert high == pytest.approx(np.mean(values) + 1.96 * error, abs=0.24 * error)


def test_the_registered_claims_hold_together():
    names = [claim.name for claim in REGISTERED]
    assert len(set(names)) == len(names)
    assert {claim.measure for claim in REGISTERED} <= set(MEASURES)
    assert {line.claim for line in ABSTRACT} <= set(names)
    assert {claim.figure for claim in REGISTERED} <= set(FIGURES)
    assert all(len(claim.models) == (3 if claim.judge == "nearer" else 2) for claim in REGISTERED)
