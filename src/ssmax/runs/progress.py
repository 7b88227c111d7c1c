"""Progress bars with the time left; no torch."""

import sys

from tqdm import tqdm


def progress_bar(
    total: int, description: str, shown: bool = True, *, unit: str = "", initial: int = 0, delay: float = 0
) -> tqdm:
    """Return a progress bar that shows the time left. In a log file it writes few lines.

    Args:
        total: amount of work.
        description: text before the bar.
        shown: False: show no bar.
        unit: unit of total. With a unit, the amount that is done is shown too.
        initial: amount that an earlier process did.
        delay: seconds before the bar appears; shorter work shows none.
    """
    counted = "{n_fmt}/{total_fmt}" + f" {unit}, " if unit else ""
    return tqdm(
        total=total,
        desc=description,
        bar_format="{desc} {percentage:3.0f}%|{bar}| " + counted + "{elapsed} elapsed, {remaining} left",
        smoothing=0.02,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        dynamic_ncols=True,
        disable=not shown,
        unit_scale=bool(unit),
        initial=initial,
        delay=delay,
    )
