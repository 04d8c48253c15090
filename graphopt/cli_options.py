"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        help="A Hugging Face directory, a .pt2 exported program, or weights with --factory.",
    ),
]
Optimized = Annotated[
    Path, typer.Argument(metavar="DST", help="A directory that graphopt wrote, or a source.")
]
OnnxFile = Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The ONNX file.")]
Factory = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE.MODULE:FUNCTION",
        help="Makes the dense model, where files alone do not say how.",
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="A preset (see `graphopt passes`), a YAML file, or passes separated by commas.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="BUDGET",
        help="What one forward pass may cost: a share of the dense model's FLOPs (60% or 0.6), "
        "latency, parameters or bytes (60% latency), or an amount (12ms, 2 GFLOPs, "
        "5M parameters, 40MB). Default: the recipe's.",
    ),
]
MaxDrift = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Give up changes beyond this relative error of the outputs: 10% or 0.1.",
    ),
]
MinCosine = Annotated[
    float | None,
    typer.Option(metavar="X", help="Give up changes below this mean cosine of the outputs."),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="uniform: the same share everywhere; solver: where it costs least accuracy.",
    ),
]
Runtime = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where inference is timed: torch, onnxruntime, or onnxruntime:EXECUTION_PROVIDER.",
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Orders equally good choices.")]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help='Real inputs: .npz, .safetensors, or .jsonl rows of {"text": ...}.',
    ),
]
CalibrationStore = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Keep finished statistics here; a run that was stopped goes on."
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave this alone: a name, or re:REGEX. Repeatable."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=SHARE", help="Keep this share of it. Repeatable."),
]
Limit = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Make only the first N changes.")
]
NoMeasure = Annotated[
    bool, typer.Option("--no-measure", help="Time nothing: trust FLOPs about what is faster.")
]
Batch = Annotated[
    int | None, typer.Option(metavar="N", help="Rows of the example inputs, which are inferred.")
]
Length = Annotated[
    int | None, typer.Option(metavar="N", help="Most tokens per row of the example inputs.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Meta = Annotated[
    bool,
    typer.Option(
        "--meta",
        help="Shapes only, no weights are read; the default if they do not fit in memory.",
    ),
]
