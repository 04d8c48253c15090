"""All trainings of a study: tuned, in turns, and kept, so that a stopped study goes on."""

from __future__ import annotations

import csv
import math
import os
import statistics
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import torch

from graphopt.environment import environment, write_csv

from .study import DENSE, METHOD, Study
from .tasks import Task
from .trial import Trial, full_flops, run_trial


class Key(NamedTuple):
    """Which training; a study has each once."""

    arm: str
    share: float
    rate: float
    seed: int
    precision: str


class Trials:
    """The trainings of a study that are done, in a CSV file; others are added when asked for.

    Args:
        study: What is compared.
        path: The file.
        source: Where workers read the workload from (see `load_task`).
        workers: Trainings at a time, each with its share of the threads.
    """

    def __init__(self, study: Study, path: Path, source: Any, workers: int) -> None:
        self.study = study
        self._path = path
        self._source = source
        self._workers = workers
        self.done = {key_of(trial): trial for trial in read_trials(path)}

    def tune(self, precision: str) -> Iterator[str]:
        """Train every arm and budget with every learning rate; yield what is done."""
        yield from self._run(
            Key(name, share, rate, seed, precision)
            for seed in self.study.tuning_seeds
            for name, share in self._budgets()
            for rate in self.study.rates_of(name)
        )

    def best_rate(self, name: str, share: float, precision: str) -> float:
        """Return the learning rate with the lowest mean loss on the tuning split so far."""
        found: dict[float, list[float]] = {}
        for rate in self.study.rates_of(name):
            for seed in self.study.tuning_seeds:
                trial = self.done.get(Key(name, share, rate, seed, precision))
                if trial is not None:
                    found.setdefault(rate, []).append(_finite(trial.loss))
        if not found:
            raise SystemExit(
                f"{name!r} at {share} has no tuned learning rate yet; go on with `run`"
            )
        return min(found, key=lambda rate: statistics.fmean(found[rate]))

    def measure(self, precision: str) -> Iterator[str]:
        """Train every arm and budget with its best rate and every seed; yield what is done.

        The seeds come in turns, so that a study that is stopped has some of each arm.
        """
        budgets = list(self._budgets())
        most = max(self.study.seeds, self.study.full_seeds)
        yield from self._run(
            Key(name, share, self.best_rate(name, share, precision), seed, precision)
            for seed in range(1, most + 1)
            for name, share in budgets
            if seed in self.study.seeds_of(name, share)
        )

    def of(self, name: str, share: float, precision: str) -> list[Trial]:
        """Return the trainings of an arm and budget with its best rate that count, by seed."""
        trials = [
            trial
            for trial in self.done.values()
            if (trial.arm, trial.share, trial.precision) == (name, share, precision)
        ]
        if not any(trial.seed > 0 for trial in trials):
            return []
        rate = self.best_rate(name, share, precision)
        found = [trial for trial in trials if trial.seed > 0 and trial.rate == rate]
        return sorted(found, key=lambda trial: trial.seed)

    def _budgets(self) -> Iterator[tuple[str, float]]:
        """Yield arms with their budgets: the method and the full budget first."""
        pairs = [(name, share) for name in self.study.names for share in self.study.shares_of(name)]
        full = max(self.study.shares)
        yield from sorted(
            pairs, key=lambda pair: (pair[0] != METHOD, pair != (DENSE, full), pair[0] != DENSE)
        )

    def _run(self, keys: Iterable[Key]) -> Iterator[str]:
        waiting = [key for key in dict.fromkeys(keys) if key not in self.done]
        threads = max(1, torch.get_num_threads() // self._workers)
        with ProcessPoolExecutor(
            self._workers,
            mp_context=get_context("spawn"),
            initializer=_start,
            initargs=(self.study, self._source, threads),
        ) as pool:
            for number, trial in enumerate(pool.map(_work, waiting)):
                self.done[key_of(trial)] = trial
                write_csv(self._path, [trial], environment())
                yield f"{number + 1} of {len(waiting)}: {trial}"


def key_of(trial: Trial) -> Key:
    """Return which training this was."""
    return Key(trial.arm, trial.share, trial.rate, trial.seed, trial.precision)


def read_trials(path: Path) -> list[Trial]:
    """Return the trainings in a file, none if there is no file."""
    if not path.exists():
        return []
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Trial(**{item.name: kinds[str(item.type)](row[item.name]) for item in fields(Trial)})
            for row in csv.DictReader(file)
        ]


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


class _Worker(NamedTuple):
    study: Study
    task: Task
    full_flops: float


_worker: _Worker | None = None


def _start(study: Study, source: Any, threads: int) -> None:
    """Read the workload once per process."""
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    task = source(study)
    _worker = _Worker(study, task, full_flops(study, task))


def _end_with_parent() -> None:
    """End this process when the parent ends, even if that was killed: a training takes minutes."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(key: Key) -> Trial:
    assert _worker is not None
    return run_trial(
        _worker.study,
        _worker.task,
        key.arm,
        key.share,
        key.rate,
        key.seed,
        full_flops=_worker.full_flops,
        precision=key.precision,
    )
