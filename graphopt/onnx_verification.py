"""Compare ONNX files with the models they came from, at several shapes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.passes.errors import ExportError, GraphoptError

from .flat_model import FlatModel, arguments_for, evaluating
from .float64 import Float64Arithmetic
from .inputs import variants
from .onnx_comparison import Comparison, compare, integer_roundoff_of, unit_roundoff_of
from .onnx_runtime import run, session

_WORD = re.compile(r"[A-Za-z_]\w*")

VARIANTS = 3
"""Sets of inputs other than the example that every comparison covers, at least."""


@dataclass(frozen=True)
class VerifyReport:
    """What comparing an ONNX file with its model found.

    Attributes:
        path: The file.
        comparisons: Every output at every set of inputs, the example's first.
        problem: A reason why the comparison could not be finished, else None.
    """

    path: Path
    comparisons: tuple[Comparison, ...]
    problem: str | None = None

    @property
    def failure(self) -> str | None:
        """One sentence that says the first difference, or None if the file is right."""
        failures = (comparison.failure for comparison in self.comparisons)
        return next((failure for failure in failures if failure), self.problem)

    @property
    def difference(self) -> float:
        """Largest absolute difference of any output."""
        return max((comparison.difference for comparison in self.comparisons), default=0.0)

    @property
    def shapes(self) -> list[Mapping[str, tuple[int, ...]]]:
        """The different input shapes that were compared, the example's first."""
        shapes: list[Mapping[str, tuple[int, ...]]] = []
        for comparison in self.comparisons:
            if comparison.shapes not in shapes:
                shapes.append(comparison.shapes)
        return shapes

    @property
    def fails_on_example(self) -> bool:
        """Whether an output differs at the shapes of the example itself."""
        return any(
            comparison.failure is not None and comparison.shapes == self.comparisons[0].shapes
            for comparison in self.comparisons
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "path": str(self.path),
            "failure": self.failure,
            "difference": self.difference,
            "comparisons": [
                {
                    "output": comparison.output,
                    "shapes": {name: list(shape) for name, shape in comparison.shapes.items()},
                    "difference": comparison.difference,
                    "bound": comparison.bound,
                    "failure": comparison.failure,
                }
                for comparison in self.comparisons
            ],
        }

    def __str__(self) -> str:
        """Return the finding as one sentence."""
        if self.failure is not None:
            return f"{self.path}: {self.failure}"
        return (
            f"{self.path}: equal to torch at {len(self.shapes)} input shapes, "
            f"largest difference {self.difference:.3g}"
        )


def verify_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any = None,
    *,
    threads: int | None = None,
) -> VerifyReport:
    """Compare an ONNX file with a model, at the example's shapes and at least three others.

    Sizes that the file leaves open are varied; if there are none, values are. A difference is
    not an exception: it is `failure` of the report.

    Args:
        model: The model, in any mode; it is compared in evaluation mode.
        path: The ONNX file.
        example_inputs: As for `graphopt.optimize`; inferred if None.
        threads: Threads for ONNX Runtime.

    Raises:
        CheckpointError: if the file is missing or not a valid ONNX file.
        InputError: if there are no example inputs and none can be inferred.
    """
    arguments = arguments_for(model, example_inputs)
    with evaluating(model):
        return verify_flat(FlatModel(model, arguments), Path(path), threads=threads)


def verify_flat(flat: FlatModel, path: Path, *, threads: int | None = None) -> VerifyReport:
    """Compare an ONNX file with a flat model in evaluation mode (see `verify_onnx`)."""
    runtime = session(path, threads)
    open_sizes = {
        argument.name: {
            index: size for index, size in enumerate(argument.shape) if not isinstance(size, int)
        }
        for argument in runtime.get_inputs()
    }
    example = dict(zip(flat.input_names, flat.example, strict=True))
    roundoffs = unit_roundoff_of(flat), integer_roundoff_of(flat)
    comparisons: list[Comparison] = []
    compared = 0
    for inputs in itertools.chain([example], _other_inputs(example, open_sizes)):
        tensors = list(inputs.values())
        expected = _accepted(flat, tensors)
        if expected is None:
            continue  # sizes that the model does not take need not work in ONNX either
        with torch.no_grad(), Float64Arithmetic():
            exact = flat(*tensors)
        try:
            actual = run(runtime, inputs)
        except ExportError as error:
            return VerifyReport(path, tuple(comparisons), str(error))
        missing = sorted(set(flat.output_names) - set(actual))
        if missing:
            return VerifyReport(path, tuple(comparisons), f"the file has no outputs {missing}")
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        for name, wanted, reference in zip(flat.output_names, expected, exact, strict=True):
            comparisons.append(
                compare(name, shapes, actual[name], wanted.cpu(), reference.cpu(), *roundoffs)
            )
        compared += inputs is not example
        if compared == VARIANTS:
            break
    problem = None
    if compared < VARIANTS:
        problem = (
            f"the model accepts only {compared} of the inputs tried besides the example, "
            f"and {VARIANTS} are needed to trust its open sizes; pass a larger example"
        )
    return VerifyReport(path, tuple(comparisons), problem)


def _accepted(flat: FlatModel, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
    """Return the model's outputs, None if it refuses the sizes."""
    try:
        with torch.no_grad():
            outputs: tuple[torch.Tensor, ...] = flat(*tensors)
    # What torch raises where sizes do not fit, and what checks in models' own code raise.
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError):
        return None
    except GraphoptError:  # an optimized model that has no graph for these sizes
        return None
    return outputs


def _other_inputs(
    example: dict[str, torch.Tensor], open_sizes: Mapping[str, Mapping[int, str]]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield inputs with all open sizes changed, then one by one; other values if none is open."""
    words = sorted(
        {
            word
            for sizes in open_sizes.values()
            for size in sizes.values()
            for word in _WORD.findall(size)
        }
    )
    symbols = {word: f"s{index}" for index, word in enumerate(words)}
    generator = torch.Generator().manual_seed(0)
    for varied in [words, *([word] for word in words)] if words else [[]] * VARIANTS:
        dynamic = {
            name: {
                index: _WORD.sub(lambda word: symbols[word.group()], size)
                for index, size in sizes.items()
                if set(_WORD.findall(size)) <= set(varied)
            }
            for name, sizes in open_sizes.items()
        }
        yield from variants(example, dynamic, generator=generator)
