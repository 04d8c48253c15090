"""The frontier as a picture: loss over operations, and over seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .saving import frontier
from .study import DENSE, METHOD
from .trial import Trial

_COLORS = {DENSE: "#7d8ba1", METHOD: "#c2451e"}


def draw(
    path: Path,
    title: str,
    arms: Mapping[str, Mapping[float, Sequence[Trial]]],
    seconds_per_flop: Mapping[str, float],
) -> None:
    """Draw the dense frontier, the method and all controls.

    Args:
        path: PNG file to write.
        title: Above the picture.
        arms: Trainings by arm and budget.
        seconds_per_flop: By arm; arms without one are left out of the second half.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    left: Any = axes[0]
    right: Any = axes[1]
    for name, budgets in arms.items():
        if not budgets:
            continue
        _points(left, name, budgets, 1.0)
        if name in seconds_per_flop:
            _points(right, name, budgets, seconds_per_flop[name])
    left.set(xlabel="operations of the training", ylabel="held-out loss [nats]", xscale="log")
    right.set(xlabel="seconds of the training", xscale="log")
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _points(axes: Any, name: str, budgets: Mapping[float, Sequence[Trial]], factor: float) -> None:
    spent = {
        share: factor * statistics.fmean(trial.flops for trial in trials)
        for share, trials in budgets.items()
    }
    color = _COLORS.get(name)
    if name == DENSE:
        points = frontier({spent[s]: [t.loss for t in trials] for s, trials in budgets.items()})
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.5)
    means = [statistics.fmean(trial.loss for trial in trials) for trials in budgets.values()]
    errors = [
        statistics.stdev(trial.loss for trial in trials) if len(trials) > 1 else 0.0
        for trials in budgets.values()
    ]
    marker = "o" if name in (DENSE, METHOD) else "x"
    axes.errorbar(
        list(spent.values()), means, yerr=errors, fmt=marker, color=color, label=name, capsize=2
    )
