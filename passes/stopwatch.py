"""Timing of functions in turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_SAMPLES = 15
_FEWEST_SAMPLES = 5


def interleaved_ms(
    functions: Sequence[Callable[[], Any]], device: torch.device, budget_s: float
) -> list[list[float]]:
    """Time functions in turns, in alternating order.

    Short functions run several times per sample, so that a sample is long against the clock;
    long ones get fewer samples, at least five.

    Args:
        functions: What to time; each is first run three times to warm up.
        device: Where they run; GPU work is waited for.
        budget_s: Seconds to spend on each of them, about.

    Returns:
        For each function its times in milliseconds per run, one per turn.
    """
    for _ in range(2):
        for function in functions:
            _sample_s(function, 1, device)
    once_s = [max(_sample_s(function, 1, device), 1e-7) for function in functions]
    repeats = [max(1, int(budget_s / _SAMPLES / seconds)) for seconds in once_s]
    turns = max(_FEWEST_SAMPLES, min(_SAMPLES, int(budget_s / max(once_s))))
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(turns):
        order = range(len(functions))
        for index in order if turn % 2 == 0 else reversed(order):
            seconds = _sample_s(functions[index], repeats[index], device)
            times[index].append(1e3 * seconds / repeats[index])
    return times


def _sample_s(function: Callable[[], Any], repeats: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
