"""Stored differences of the registered claims, one for each seed. They add to the estimate of the deviation over seeds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# (form, name of a claim) -> seed -> difference, as it is printed.
Differences = Mapping[tuple[str, str], Mapping[int, float]]

FILE = Path(__file__).with_name("seeds.json")  # written by docs/reproduced.py
# Settings that do not change the difference between two models of one seed.
FREE = ("name", "models", "retrieval", "counting", "seeds")


def stored(recipe: Mapping[str, Any], corpus: str | None) -> Differences:
    """Return the stored differences of a recipe on the default text; none if the recipe is another one.

    Args:
        recipe: its fields, as recipe.json holds them.
        corpus: --corpus of the command line.
    """
    known = json.loads(FILE.read_bytes())
    if corpus is not None or fixed(recipe) != known["recipe"]:
        return {}
    return {
        (form, claim): {int(seed): value for seed, value in seeds.items()}
        for form, claims in known["differences"].items()
        for claim, seeds in claims.items()
    }


def fixed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe on which differences depend."""
    return {name: value for name, value in recipe.items() if name not in FREE}
