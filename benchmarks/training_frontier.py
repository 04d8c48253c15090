"""Compute saved at equal loss: one study, run, timed, analysed and drawn.

    python benchmarks/training_frontier.py run benchmarks/frontier/studies/mnist_vit.yaml --data DIR
    python benchmarks/training_frontier.py times ... --data DIR
    python benchmarks/training_frontier.py analyse ...

`run` does everything; started again, it goes on. It tunes the learning rate of every arm and budget
on the tuning split (seeds up to 0), then trains all of them with every seed and measures them on
the test split, then times the method, and analyses what came out. A language study with
`--checkpoint` starts from what is there, and trains it first where nothing is.
`times` measures seconds per operation of the dense model and an arm in turns, and what the arm's
analysis takes, alone on the machine.
`analyse` computes what is saved, with intervals, and draws the frontier.

Results go to benchmarks/results/frontier/: STUDY_trials.csv, STUDY_times.csv, STUDY.json and
STUDY.png.
"""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from frontier.picture import draw
from frontier.saving import Difference, Interval, difference, saving, saving_over
from frontier.study import DENSE, METHOD, Arm, Study, read_study
from frontier.tasks import load_task
from frontier.times import pace
from frontier.trial import Precision, Trial, full_flops, prepared, train
from frontier.trials import Trials

from graphopt.environment import environment, write_csv
from graphopt.files import new_directory
from graphopt.training import Ledger

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)

_RESULTS = Path(__file__).parent / "results" / "frontier"
_StudyPath = Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study.")]
_Data = Annotated[Path | None, typer.Option(help="Where the workload's data lies.")]
_Checkpoint = Annotated[Path | None, typer.Option(help="Directory of the workload's checkpoint.")]
_Precision = Annotated[Precision, typer.Option(help="float32, or bfloat16 for autocast.")]
_Results = Annotated[Path, typer.Option(help="Directory of the results.")]


@dataclass(frozen=True)
class TimesRow:
    """Seconds per operation of an arm over those of the dense model, measured in turns.

    `arm_outside_seconds` are those that the arm's model takes to be made.
    """

    study: str
    arm: str
    precision: str
    dense_seconds_per_tflop: float
    arm_seconds_per_tflop: float
    ratio: float
    arm_outside_seconds: float


@dataclass(frozen=True)
class Timing:
    """What an arm and the dense model take.

    Attributes:
        dense: Seconds per operation of the dense model.
        own: Seconds per operation of the arm's steps.
        outside: Seconds that the arm's model takes to be made.
    """

    dense: float
    own: float
    outside: float


@app.command()
def run(
    path: _StudyPath,
    data: _Data = None,
    checkpoint: _Checkpoint = None,
    precision: _Precision = "float32",
    workers: Annotated[int, typer.Option(help="Trainings at a time.")] = os.cpu_count() or 1,
    results: _Results = _RESULTS,
) -> None:
    """Train and time everything that is not there yet, then analyse."""
    study = read_study(path)
    if study.workload == "language" and checkpoint is not None and not checkpoint.exists():
        typer.echo(f"{checkpoint} is not there, so it is trained first")
        typer.echo(_pretrain(study, data, checkpoint))
    source = partial(load_task, data, checkpoint)
    typer.echo(f"{source(study).samples} training samples")  # says here what data is missing
    results.mkdir(parents=True, exist_ok=True)
    trials = Trials(study, results / f"{path.stem}_trials.csv", source, workers)
    for line in trials.tune(precision):
        typer.echo(f"tuning, {line}")
    for line in trials.measure(precision):
        typer.echo(line)
    timings = _timings(results / f"{path.stem}_times.csv")
    for kind in get_args(Precision):
        if METHOD in study.arms and METHOD not in timings.get(kind, {}):
            times(path, data, checkpoint, kind, METHOD, results)
    analyse(path, precision, results)


def _pretrain(study: Study, data: Path | None, checkpoint: Path) -> str:
    """Train a language study's dense model on the other half of its corpus, to be adapted."""
    other = study.model_copy(update={"options": {**study.options, "half": 0}})
    task = load_task(data, None, other)
    flops = full_flops(other, task)
    trainee, _, _ = prepared(other, task, Arm(), flops, other.rates[0], 1, "float32")
    ledger = Ledger()
    train(trainee, ledger)
    with torch.no_grad():
        quality = task.evaluate(trainee.model.eval(), "test")
    model: Any = trainee.model
    with new_directory(checkpoint) as directory:
        model.save_pretrained(directory)
    return f"{ledger.total_flops:.3e} operations, {quality}"


@app.command()
def times(
    path: _StudyPath,
    data: _Data = None,
    checkpoint: _Checkpoint = None,
    precision: _Precision = "float32",
    arm: Annotated[str, typer.Option(help="What to time.")] = METHOD,
    results: _Results = _RESULTS,
) -> None:
    """Time an arm in turns with the dense model."""
    study = read_study(path)
    task = load_task(data, checkpoint, study)
    found = pace(study, task, (DENSE, arm), study.rates[0], precision)
    row = TimesRow(
        study=path.stem,
        arm=arm,
        precision=precision,
        dense_seconds_per_tflop=round(1e12 * statistics.fmean(found.first), 4),
        arm_seconds_per_tflop=round(1e12 * statistics.fmean(found.second), 4),
        ratio=round(found.ratio, 4),
        arm_outside_seconds=round(found.outside, 2),
    )
    typer.echo(str(row))
    results.mkdir(parents=True, exist_ok=True)
    write_csv(results / f"{path.stem}_times.csv", [row], environment())


@app.command()
def analyse(
    path: _StudyPath, precision: _Precision = "float32", results: _Results = _RESULTS
) -> None:
    """Compute what is saved and draw the frontier."""
    study = read_study(path)
    trials = Trials(study, results / f"{path.stem}_trials.csv", None, 1)
    arms = {
        name: {s: done for s in study.shares_of(name) if (done := trials.of(name, s, precision))}
        for name in study.names
    }
    timings = _timings(results / f"{path.stem}_times.csv")
    found = _analysis(study, arms, timings)
    name = path.stem if precision == "float32" else f"{path.stem}_{precision}"
    (results / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    paces = {arm: timing.own for arm, timing in timings.get(precision, {}).items()}
    draw(results / f"{name}.png", name.replace("_", " "), arms, paces)
    typer.echo(json.dumps(found, indent=2))


def _timings(path: Path) -> dict[str, dict[str, Timing]]:
    """Return the last times of the arms that were timed and of the dense model, by precision."""
    if not path.exists():
        return {}
    found: dict[str, dict[str, Timing]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            dense = float(row["dense_seconds_per_tflop"]) / 1e12
            outside = float(row["arm_outside_seconds"])
            timings = found.setdefault(row["precision"], {})
            timings[DENSE] = Timing(dense, dense, 0.0)
            timings[row["arm"]] = Timing(dense, dense * float(row["ratio"]), outside)
    return found


def _finite(values: Interval | Difference) -> dict[str, float | None]:
    """Return the fields, None for what is not finite: JSON has no infinity."""
    return {
        name: round(value, 6) if math.isfinite(value) else None
        for name, value in asdict(values).items()
    }


def _saved_time(saved: Interval, trials: list[Trial], timing: Timing) -> Interval:
    """Return the share of the time that is saved where so many operations are.

    Args:
        saved: Share of the operations.
        trials: The trainings, for how many operations they made outside of their steps.
        timing: What operations take, and what is outside of steps.
    """
    flops = statistics.fmean(trial.flops for trial in trials)
    outside = statistics.fmean(trial.outside_flops for trial in trials)
    seconds = (flops - outside) * timing.own + timing.outside
    ratio = seconds / (flops * timing.dense)
    return Interval(*(1 - (1 - share) * ratio for share in (saved.value, saved.low, saved.high)))


def _analysis(
    study: Study,
    arms: dict[str, dict[float, list[Trial]]],
    timings: dict[str, dict[str, Timing]],
) -> dict[str, Any]:
    """Return savings of every arm at equal loss, and the differences to the full budget.

    Of the other arms it is also given what the method saves against them.

    Times are given for every precision that was timed: how many operations are saved is known from
    the trainings alone.
    """
    dense = arms[DENSE]
    if max(study.shares) not in dense:
        raise SystemExit("the full dense training is not there yet; go on with `run`")
    full = dense[max(study.shares)]
    method = next(iter(arms.get(METHOD, {}).values()), [])
    found: dict[str, Any] = {
        "dense": {
            "flops": statistics.fmean(trial.flops for trial in full),
            "loss": statistics.fmean(trial.loss for trial in full),
            "accuracy": statistics.fmean(trial.accuracy for trial in full),
        }
    }
    for name, budgets in arms.items():
        for share, trials in budgets.items():
            if name == DENSE:
                continue
            loss = difference(trials, full, lambda trial: trial.loss)
            worse = difference(trials, full, lambda trial: -trial.accuracy)
            allowed = study.tolerance_accuracy
            saved = saving(trials, dense)
            times = {
                precision: _finite(_saved_time(saved, trials, timed[name]))
                for precision, timed in timings.items()
                if name in timed
            }
            found[name] = {
                "share": share,
                "seeds": len(trials),
                "flops": statistics.fmean(trial.flops for trial in trials),
                "loss": statistics.fmean(trial.loss for trial in trials),
                "accuracy": statistics.fmean(trial.accuracy for trial in trials),
                "saved_flops": _finite(saved),
                "saved_time": times,
                "method_saves": None
                if name == METHOD or not method
                else _finite(saving_over(method, trials, dense)),
                "loss_difference": _finite(loss),
                "accuracy_lost": _finite(worse),
                "not_inferior": loss.upper <= study.tolerance
                and (allowed is None or worse.upper <= allowed),
            }
    return found


if __name__ == "__main__":
    app()
