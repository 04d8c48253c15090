"""A frontier as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graphopt.passes.errors import MissingExtraError


def draw(
    path: Path,
    costs: Sequence[float],
    errors: Sequence[float],
    *,
    dense: float,
    cost_label: str,
    title: str,
) -> None:
    """Write a PNG of relative errors over costs, with the dense model at an error of 0.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "drawing a frontier needs matplotlib: pip install 'graphopt[plot]'"
        ) from error
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(costs, errors, marker="o", label="solver")
    axes.plot(
        [dense], [0.0], marker="s", linestyle="none", color="black", label="dense", clip_on=False
    )
    axes.set_xlabel(cost_label)
    axes.set_ylabel("relative error of the outputs")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, format="png")
