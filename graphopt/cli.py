"""The command line: one command per thing that can be done with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_results
from .cli_models import (
    check_file,
    check_output,
    example_inputs,
    exceeds_memory,
    keep_shares,
    open_model,
)
from .cli_options import (
    Allocation,
    Batch,
    Budget,
    CalibrationFile,
    CalibrationStore,
    Factory,
    Ignore,
    Json,
    Keep,
    Length,
    Limit,
    MaxDrift,
    Meta,
    MinCosine,
    NoMeasure,
    Optimized,
    RecipeName,
    Runtime,
    Seed,
    Source,
)
from .cli_terminal import activity, command, progress_bar, say, show, show_json
from .errors import ConfigError

app = typer.Typer(
    name="graphopt",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line of this process."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"graphopt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """An optimizing compiler for the cost of PyTorch models that already exist."""


@command(
    app,
    "graphopt optimize minilm/ -o out/ --recipe deploy --budget 60%",
    "graphopt optimize minilm/ -o out/ --calibration texts.jsonl --ignore pooler",
    "graphopt optimize weights.safetensors --factory my.models:resnet -o out/",
)
def optimize(
    source: Source,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DST", help="Directory to write; must be new."),
    ] = None,
    recipe: RecipeName = "train",
    budget: Budget = None,
    max_drift: MaxDrift = None,
    min_cosine: MinCosine = None,
    allocation: Allocation = None,
    runtime: Runtime = None,
    seed: Seed = 0,
    calibration: CalibrationFile = None,
    calibration_store: CalibrationStore = None,
    ignore: Ignore = None,
    keep: Keep = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the plan, like `graphopt plan`.")
    ] = False,
    factory: Factory = None,
    limit: Limit = None,
    no_measure: NoMeasure = False,
    batch: Batch = None,
    length: Length = None,
    as_json: Json = False,
) -> None:
    """Make a checkpoint cheaper and write it, with the report of what changed."""
    options = _options(
        recipe,
        ignore,
        keep,
        calibration,
        budget=budget,
        max_drift=max_drift,
        min_cosine=min_cosine,
        allocation=allocation,
        runtime=runtime,
    )
    options |= {"limit": limit, "seed": seed}
    if dry_run:
        _show_plan(source, factory, options, no_measure, batch, length, as_json, meta=False)
        return
    if output is None:
        raise typer.BadParameter("pass -o/--output DST, or --dry-run to only see the plan")
    check_output(output, source, replaceable=True)
    from .api import optimize as optimize_model
    from .checkpoint import save
    from .report import report as report_of

    opened = open_model(source, factory)
    inputs = example_inputs(opened, batch, length)
    with progress_bar() as progress:
        model = optimize_model(
            opened.model,
            inputs,
            **options,
            inplace=True,
            measure=not no_measure,
            calibration_store=calibration_store,
            tokenizer=opened.directory,
            progress=progress,
        )
    with activity(f"Writing {output}"):
        save(model, output, factory=factory)
    if as_json:
        show_json({"path": str(output), **report_of(model).to_json()})
    else:
        show(report_of(model), as_json=False)
        typer.echo(f"written to {output}")


@command(
    app,
    "graphopt plan minilm/ --recipe deploy --budget 60%",
    "graphopt plan llama-7b/ --meta --json",
    "graphopt plan minilm/ --recipe deploy --calibration texts.jsonl --sweep -o frontier/",
)
def plan(
    source: Source,
    recipe: RecipeName = "train",
    budget: Budget = None,
    max_drift: MaxDrift = None,
    min_cosine: MinCosine = None,
    allocation: Allocation = None,
    runtime: Runtime = None,
    seed: Seed = 0,
    calibration: CalibrationFile = None,
    ignore: Ignore = None,
    keep: Keep = None,
    factory: Factory = None,
    limit: Limit = None,
    no_measure: NoMeasure = False,
    meta: Meta = False,
    batch: Batch = None,
    length: Length = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Show what accuracy costs, from 90% to 30% of the cost.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="With --sweep: write frontier.json and .png here."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what `optimize` would change, and every refusal with its reason; change nothing."""
    if output is not None and not sweep:
        raise typer.BadParameter("--output goes with --sweep: a plan alone writes nothing")
    options = _options(
        recipe,
        ignore,
        keep,
        calibration,
        budget=budget,
        max_drift=max_drift,
        min_cosine=min_cosine,
        allocation=allocation,
        runtime=runtime,
    )
    options |= {"limit": limit, "seed": seed}
    if sweep:
        _show_frontier(source, factory, options, no_measure, batch, length, as_json, output)
        return
    _show_plan(source, factory, options, no_measure, batch, length, as_json, meta=meta)


@command(app, "graphopt densify out/ -o dense/")
def densify(
    optimized: Optimized,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="Directory to write.")
    ],
    factory: Factory = None,
    as_json: Json = False,
) -> None:
    """Write an ordinary dense checkpoint of an optimized model, where that is possible."""
    from .checkpoint import save_dense

    check_output(output, optimized, replaceable=False)
    opened = open_model(optimized, factory)
    with activity(f"Writing {output}"):
        save_dense(opened.model, output)
    if as_json:
        show_json({"path": str(output)})
    else:
        typer.echo(f"written to {output}")


@command(app, "graphopt bisect minilm/ --recipe deploy --max-error 0.1")
def bisect(
    source: Source,
    max_error: Annotated[
        float, typer.Option(metavar="X", help="Largest relative error of the outputs that is fine.")
    ],
    recipe: RecipeName = "train",
    budget: Budget = None,
    calibration: CalibrationFile = None,
    ignore: Ignore = None,
    keep: Keep = None,
    factory: Factory = None,
    no_measure: NoMeasure = False,
    batch: Batch = None,
    length: Length = None,
    as_json: Json = False,
) -> None:
    """Find the first change that breaks the model or makes its outputs differ too much."""
    from .cli_bisect import first_bad_change

    options = _options(recipe, ignore, keep, calibration, budget=budget)
    opened = open_model(source, factory)
    options |= {
        "measure": not no_measure,
        "tokenizer": opened.directory,
    }
    inputs = example_inputs(opened, batch, length)
    with activity("Looking for the change"):
        finding = first_bad_change(opened.model, inputs, options, max_error)
    show(finding, as_json=as_json)


def _options(
    recipe: str,
    ignore: list[str] | None,
    keep: list[str] | None,
    calibration: Path | None,
    **settings: Any,
) -> dict[str, Any]:
    """Return the options of `graphopt.plan`, checked before a model is read.

    Args:
        recipe: The recipe.
        ignore: Targets to leave alone.
        keep: Texts such as `layer.0.mlp=50%`.
        calibration: File of real inputs.
        settings: What else to put on top of the recipe.
    """
    from .job import resolve_recipe

    check_file(calibration, "calibration")
    return {
        "recipe": resolve_recipe(
            recipe, ignore=tuple(ignore or ()), keep=keep_shares(keep or ()), **settings
        ),
        "calibration": calibration,
    }


def _show_plan(
    source: Path,
    factory: str | None,
    options: dict[str, Any],
    no_measure: bool,
    batch: int | None,
    length: int | None,
    as_json: bool,
    *,
    meta: bool,
) -> None:
    from .api import plan as plan_of
    from .report import plan_report

    if not meta and exceeds_memory(source):
        say(f"graphopt: the weights of {source} do not fit in memory: shapes only")
        meta = True
    if meta and options["calibration"] is not None:
        raise ConfigError("calibration needs weights, and this plan has shapes only")
    opened = open_model(source, factory, meta=meta)
    inputs = example_inputs(opened, batch, length)
    with progress_bar() as progress:
        made = plan_of(
            opened.model,
            inputs,
            **options,
            measure=not (no_measure or meta),
            tokenizer=opened.directory,
            progress=progress,
        )
    if as_json:
        typer.echo(made.to_json())
    else:
        show(plan_report(made), as_json=False)


def _show_frontier(
    source: Path,
    factory: str | None,
    options: dict[str, Any],
    no_measure: bool,
    batch: int | None,
    length: int | None,
    as_json: bool,
    output: Path | None,
) -> None:
    from .frontier import frontier

    del options["limit"]
    opened = open_model(source, factory)
    inputs = example_inputs(opened, batch, length)
    with progress_bar() as progress:
        found = frontier(
            opened.model,
            inputs,
            **options,
            measure=not no_measure,
            tokenizer=opened.directory,
            progress=progress,
        )
    if output is not None:
        found.save(output)
    show(found, as_json=as_json)


app.add_typer(cli_results.app)


if __name__ == "__main__":
    main()
