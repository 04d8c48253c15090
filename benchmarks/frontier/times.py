"""Seconds per operation of two arms, measured in turns all along their trainings.

A gate makes steps cheaper at the beginning than at the end, so both are timed at the same shares of
their trainings: at each, some steps of one and of the other in turns, each on batches of its own.
An arm's whole training takes its operations times the mean of its seconds per operation; that is
right because a clock of operations spends equally many in each part of the training. What an arm's
model takes to be made (analyses) is timed here too, on the same machine with the same threads: a
training of a study shares the machine with others.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from graphopt.training import ExecutedFlops

from .study import Samples, Study
from .tasks import Task
from .trial import Trainee, made, prepared

_PLACES = 10
_STEPS = 12
_WARM_UP = 1


@dataclass(frozen=True)
class Pace:
    """How fast two arms spend operations.

    Attributes:
        first: Seconds per operation of the first arm, by place in the training.
        second: Of the second arm.
        outside: Seconds that rewriting the second arm's model took, the first one of the process.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]
    outside: float

    @property
    def ratio(self) -> float:
        """How many times as long an operation of the second arm takes."""
        return statistics.fmean(self.second) / statistics.fmean(self.first)


def pace(study: Study, task: Task, names: tuple[str, str], rate: float, precision: str) -> Pace:
    """Time two arms of a study."""
    # Both take all samples: an arm that drops some could not be given those of the other.
    arms = [study.arm(name).model_copy(update={"samples": Samples()}) for name in names]
    # First, as a user's process makes one model, and without the counter of operations.
    _, outside = made(study, task, arms[1], 1)
    trainees = [prepared(study, task, arm, 1e18, rate, 1, precision)[0] for arm in arms]
    found: list[list[float]] = [[], []]
    for place in range(_PLACES):
        for trainee in trainees:
            trainee.clock.consumed_flops = int(1e18 * (place + 0.5) / _PLACES)
            trainee.clock.step(0)
        for item, seconds in zip(found, _timed(trainees), strict=True):
            item.append(seconds)
    return Pace(tuple(found[0]), tuple(found[1]), outside)


def _timed(trainees: list[Trainee]) -> list[float]:
    """Return the seconds per operation of each trainee, of steps in turns."""
    batches = [trainee.batches() for trainee in trainees]
    found: list[list[float]] = [[] for _ in trainees]
    for number in range(_WARM_UP + _STEPS):
        order = range(len(trainees)) if number % 2 else reversed(range(len(trainees)))
        for index in order:
            samples, batch = next(batches[index])
            started = time.perf_counter()
            trainees[index].step(samples, batch)
            seconds = time.perf_counter() - started
            with ExecutedFlops() as executed:
                trainees[index].step(samples, batch)
            found[index].append(seconds / executed.flops)
    return [statistics.median(times[_WARM_UP:]) for times in found]
