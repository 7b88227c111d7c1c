"""Draw docs/images/rope-turns.png: python docs/rope.py. How far each of RoPE's frequencies turns in training, from the recipes."""

import dataclasses
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ssmax.paper.recipes import Recipe, paper, tiny
from ssmax.plots.drawing import STYLE

HERE = Path(__file__).parent / "images"


def turns_of(recipe: Recipe, length: float, theta_factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return each frequency's place in its head, 0 to 1, and the turns that it makes within length tokens."""
    size = recipe.hidden_size // recipe.num_heads
    place = np.arange(0, size, 2) / size
    return place, length / (2 * np.pi) * (recipe.rope_theta * theta_factor) ** -place


def draw() -> Figure:
    before = dataclasses.replace(tiny(), theta=10_000.0)
    shown = (
        (paper(), "the paper: 1,024 tokens, theta 10,000", "#0072b2", "o-"),
        (before, "128 tokens, theta 10,000", "#d55e00", "s-"),
        (tiny(), f"tiny: 128 tokens, theta {tiny().rope_theta:.0f}", "#009e73", "^-"),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.2), dpi=130)
        axis = figure.subplots()
        shares = []
        for recipe, label, colour, style in shown:
            place, turns = turns_of(recipe, recipe.train_length)
            shares.append(f"{(turns >= 1).mean():.0%}")
            axis.plot(place, turns, style, ms=4, color=colour, label=f"{label}: {shares[-1]} complete a turn")
        axis.axhline(1, color="0.3", lw=1)
        axis.text(0.0, 1.12, "one full turn", fontsize=8, color="0.3")
        axis.set(
            yscale="log",
            xlabel="frequency, by its place 2i/d in the head (fast to slow)",
            ylabel="turns within the training length",
            title="The range of angles that training shows, by frequency",
        )
        axis.legend(loc="lower left")
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "rope-turns.png")
