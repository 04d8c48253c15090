"""Schedules: plain functions of the share of the training that is done, in [0, 1].

    linear(clock.progress, 1.0, 0.5)

For an option that wants a function, fix the other arguments: `partial(cosine, start=1, stop=0)`.
"""

from __future__ import annotations

import math

from graphopt.errors import ConfigError


def linear(progress: float, start: float, stop: float, *, until: float = 1.0) -> float:
    """Return a value on the line from `start` to `stop`, which it reaches at `until`."""
    return start + (stop - start) * _share(progress, until)


def cosine(progress: float, start: float, stop: float, *, until: float = 1.0) -> float:
    """Return a value on half a cosine from `start` to `stop`, flat at both ends."""
    return stop + (start - stop) * (1 + math.cos(math.pi * _share(progress, until))) / 2


def cubic(progress: float, start: float, stop: float, *, until: float = 1.0) -> float:
    """Return a value that falls fast, then ever slower: a density, while weights are removed.

    Source: Zhu and Gupta, To prune, or not to prune, 2017 (equation 1).
    """
    return stop + (start - stop) * (1 - _share(progress, until)) ** 3


def kept_share(progress: float, start: float = 0.5, *, full_at: float = 0.7) -> float:
    """Return which share of the tokens to compute: `start` at first, all from `full_at` on.

    Source: Yao et al., Random-LTD, 2022; 0.5 for fine-tuning, 0.25 from scratch.
    """
    return linear(progress, start, 1.0, until=full_at)


def warmup_linear(progress: float, *, warmup: float = 0.05) -> float:
    """Return the share of the peak learning rate: up to `1 - warmup`, then down to 0.

    It is `min(1, progress / warmup) * (1 - progress)`. At the very start it is not 0, because a
    first step with a rate of 0 would be lost: progress counts as at least 1 % of the warm-up.

    Raises:
        ConfigError: The warm-up is not in [0, 1).

    Source: Defazio et al., Optimal linear decay learning rate schedules, 2023.
    """
    if not 0 <= warmup < 1:
        raise ConfigError(f"expected a warm-up in [0, 1), got {warmup}")
    rise = 1.0 if not warmup else min(1.0, max(progress / warmup, 0.01))
    return rise * (1 - min(progress, 1.0))


def _share(progress: float, until: float) -> float:
    if not 0 < until <= 1:
        raise ConfigError(f"expected an end in (0, 1], got {until}")
    return min(max(progress / until, 0.0), 1.0)
