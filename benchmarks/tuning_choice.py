"""How a recipe or a setting was chosen: trainings of a study's model on its tuning split.

    python benchmarks/tuning_choice.py benchmarks/frontier/studies/mnist_cnn.yaml --data DIR ...
    ... --epochs 24 --recipe train --drop 0.75 --share 0.5 --rate 0.015 --seed 0 --seed -1

What is not said is as the study says, without a recipe the model is trained as it is. Every rate is
trained with every seed, one after the other; rows are added to
benchmarks/results/frontier/tuning_choices.csv. Seeds are 0 and below, which never see the test
split.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from frontier.study import Study, read_study
from frontier.tasks import load_task
from frontier.trial import Precision, full_flops, run_trial

from graphopt.environment import environment, write_csv

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)

_FILE = Path(__file__).parent / "results" / "frontier" / "tuning_choices.csv"
_ARM = "choice"


@dataclass(frozen=True)
class Choice:
    """A training on the tuning split.

    Attributes:
        study: Name of the study, with what differs from it.
        recipe: The recipe, with its budget; "dense" without one.
        drop: Probability with which `SampleGate` drops a sample that is learned, 0 for no gate.
        share: Budget, as a share of the dense model's full one.
        rate: Peak learning rate.
        seed: Seed of weights, order and augmentation.
        precision: "float32" or "bfloat16" (autocast).
        loss: Loss on the tuning split.
        accuracy: Accuracy on it, in percent.
        flops: Operations executed in all, without evaluation.
        steps: Optimizer steps.
    """

    study: str
    recipe: str
    drop: float
    share: float
    rate: float
    seed: int
    precision: str
    loss: float
    accuracy: float
    flops: int
    steps: int


@app.command()
def choose(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study.")],
    rate: Annotated[list[float], typer.Option(help="Peak learning rates.")],
    seed: Annotated[list[int], typer.Option(max=0, help="Seeds, 0 and below.")],
    share: Annotated[float, typer.Option(min=0, help="Budget, of the full dense one.")] = 1.0,
    recipe: Annotated[str | None, typer.Option(help="A recipe, or passes by comma.")] = None,
    budget: Annotated[float | None, typer.Option(help="What the recipe is given.")] = None,
    drop: Annotated[float, typer.Option(help="What `SampleGate` drops; 0: no gate.")] = 0.0,
    batch: Annotated[int | None, typer.Option(help="Samples of a step.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of the full budget.")] = None,
    model: Annotated[str, typer.Option(help="Arguments of the model that differ, JSON.")] = "{}",
    precision: Annotated[Precision, typer.Option(help="bfloat16 is autocast.")] = "float32",
    threads: Annotated[int, typer.Option(help="Threads of the training.")] = 1,
    data: Annotated[Path | None, typer.Option(help="Where the data lies.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Directory of the checkpoint.")] = None,
    results: Annotated[Path, typer.Option(help="File of the rows.")] = _FILE,
) -> None:
    """Train with every rate and seed, and add the rows."""
    torch.set_num_threads(threads)
    settings = {"batch": batch, "epochs": epochs}
    said = {name: value for name, value in settings.items() if value is not None}
    different = _arguments(model)
    arm = {
        "share": share,
        "recipe": recipe,
        "budget": budget,
        "samples": {"choice": "learned", "drop": drop} if drop else {},
    }
    whole = read_study(path)
    arguments = {**whole.model, **different}
    study = read_study(path, **said, model=arguments, rates=rate, arms={_ARM: arm})
    task = load_task(data, checkpoint, study)
    full = full_flops(study, task)
    for number, peak in itertools.product(seed, rate):
        trial = run_trial(
            study, task, _ARM, share, peak, number, full_flops=full, precision=precision
        )
        row = Choice(
            study=_name(path, whole, study),
            recipe=(recipe or "dense") + ("" if budget is None else f"{{budget={budget}}}"),
            drop=drop,
            share=share,
            rate=peak,
            seed=number,
            precision=precision,
            loss=trial.loss,
            accuracy=trial.accuracy,
            flops=trial.flops,
            steps=trial.steps,
        )
        typer.echo(str(row))
        results.parent.mkdir(parents=True, exist_ok=True)
        write_csv(results, [row], environment())


def _arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a JSON object.

    Raises:
        SystemExit: if the text is none.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise SystemExit(f"--model expects a JSON object, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise SystemExit(f"--model expects a JSON object, got {text!r}")
    return found


def _name(path: Path, whole: Study, study: Study) -> str:
    """Return the name of a study with what differs from its file."""
    batch = "" if study.batch == whole.batch else f" in batches of {study.batch}"
    epochs = "" if study.epochs == whole.epochs else f" at {study.epochs:g} epochs"
    changed = {name: value for name, value in study.model.items() if whole.model.get(name) != value}
    return (
        path.stem
        + "".join(f" of {name} {value}" for name, value in changed.items())
        + batch
        + epochs
    )


if __name__ == "__main__":
    app()
