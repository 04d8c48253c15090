"""The commands that look at models: what they are, what became of them, how fast they are."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from .cli_models import check_file, example_inputs, open_model
from .cli_options import Batch, Factory, Json, Length, Meta, OnnxFile, Optimized, Source
from .cli_terminal import activity, command, show, show_json
from .errors import VerificationError

app = typer.Typer()


@command(app, "graphopt inspect minilm/ | less")
def inspect(
    source: Source,
    factory: Factory = None,
    meta: Meta = False,
    batch: Batch = None,
    length: Length = None,
    as_json: Json = False,
) -> None:
    """Show the captured program: inputs, notes, and its readable code."""
    from graphopt.passes.facts import module_costs, total_cost

    from .capture import capture

    opened = open_model(source, factory, meta=meta)
    with activity("Capturing"):
        program = capture(opened.model, example_inputs(opened, batch, length))
    if not as_json:
        typer.echo(str(program))
        return
    dynamic = program.dynamic_dimensions()
    show_json(
        {
            "model_class": type(program.model).__name__,
            "inputs": [
                {
                    "name": node.name,
                    "dtype": str(node.meta["val"].dtype),
                    "shape": [str(size) for size in node.meta["val"].shape],
                    "dynamic": dynamic[node.name],
                }
                for node in program.placeholders
            ],
            "notes": list(program.notes),
            "total": dataclasses.asdict(total_cost(program)),
            "modules": {
                name: dataclasses.asdict(cost) for name, cost in module_costs(program).items()
            },
            "code": program.code,
        }
    )


@command(app, "graphopt report out/")
def report(optimized: Optimized, factory: Factory = None, as_json: Json = False) -> None:
    """Show what was changed: FLOPs, parameters, milliseconds and errors, layer by layer."""
    from .report import report as report_of

    show(report_of(open_model(optimized, factory).model), as_json=as_json)


@command(app, "graphopt export out/ model.onnx")
def export(
    optimized: Optimized,
    file: OnnxFile,
    opset: Annotated[
        int | None, typer.Option(metavar="N", help="ONNX opset. Default: the best that works.")
    ] = None,
    factory: Factory = None,
    batch: Batch = None,
    length: Length = None,
    as_json: Json = False,
) -> None:
    """Write an ONNX file, run it in ONNX Runtime, and keep it only if it equals torch."""
    from .export import export_onnx

    opened = open_model(optimized, factory)
    with activity(f"Exporting and comparing {file}"):
        written = export_onnx(
            opened.model, file, example_inputs(opened, batch, length), opset=opset
        )
    show(written, as_json=as_json)


@command(app, "graphopt verify out/ model.onnx")
def verify(
    optimized: Optimized,
    file: OnnxFile,
    factory: Factory = None,
    batch: Batch = None,
    length: Length = None,
    as_json: Json = False,
) -> None:
    """Compare an ONNX file with the model it came from; the exit code is 1 if it differs."""
    from .onnx_verification import verify_onnx

    check_file(file, "ONNX")
    opened = open_model(optimized, factory)
    with activity(f"Comparing {file}"):
        found = verify_onnx(opened.model, file, example_inputs(opened, batch, length))
    if found.failure is None or as_json:
        show(found, as_json=as_json)
    if found.failure is not None:
        raise VerificationError(f"{file}: {found.failure}")


@command(app, "graphopt bench minilm/ out/ --batch 32 --length 128")
def bench(
    source: Source,
    optimized: Optimized,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Rows of the inputs; 32 if they are inferred.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens per row; 128 if inferred.")
    ] = None,
    onnx: Annotated[bool, typer.Option(help="Whether to time ONNX Runtime as well.")] = True,
    training: Annotated[
        bool, typer.Option("--training", help="Time forward and backward as well.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads. Default: as torch chooses.")
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Pairs to time.")] = 20,
    device: Annotated[str, typer.Option(help="Where torch runs: cpu or cuda.")] = "cpu",
    factory: Factory = None,
    as_json: Json = False,
) -> None:
    """Time dense against optimized in turns, in torch and in ONNX Runtime."""
    from .bench import bench as compare
    from .inputs import infer_inputs

    dense, other = open_model(source, factory), open_model(optimized, factory)
    inputs = example_inputs(dense, batch, length)
    if inputs is None:
        inputs = infer_inputs(dense.model, batch=32, length=128)
    with activity("Timing"):
        result = compare(
            dense.model,
            other.model,
            example=inputs,
            threads=threads,
            repeats=repeats,
            onnx=onnx,
            training=training,
            device=device,
        )
    show(result, as_json=as_json)


@command(app, "graphopt passes")
def passes(as_json: Json = False) -> None:
    """List the passes, their options and the recipes."""
    from .cli_passes import describe_passes

    show(describe_passes(), as_json=as_json)
