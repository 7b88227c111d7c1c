"""Any call of the three operations equals the oracle, or is refused by the name of an argument."""

import subprocess
import sys
from pathlib import Path

import calls
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_random_call_equals_the_oracle_or_names_an_argument(seed):
    name, arguments, right = calls.random_call(np.random.default_rng(seed))
    try:
        calls.judge(name, arguments, right)
    except calls.Wrong as wrong:
        raise AssertionError(f"{calls.told(name, arguments)}: {wrong}") from wrong


@pytest.mark.slow
def test_ten_thousand_random_calls(record):
    """In a process of its own, which must not crash either."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", Path(calls.__file__), "10000", "1"], capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    *_, counts = done.stdout.strip().splitlines()
    found = {words.partition(" ")[2]: int(words.partition(" ")[0]) for words in counts.split(", ")}
    assert found["equal"] + found["refused"] + found["shape"] == 10_000
    assert min(found[f"{name} equal"] for name in ("visible_keys", "attention", "scalable_softmax")) > 1000
    record("random calls, right ones and broken ones", 10_000, **found)
