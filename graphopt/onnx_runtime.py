"""Run ONNX files in ONNX Runtime and compare them with the model they came from."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from graphopt.passes.calls import example_arguments
from graphopt.passes.errors import CheckpointError, ExportError, MissingExtraError

from .flat_model import FlatModel, evaluating, first_line
from .float64 import Float64Arithmetic
from .inputs import infer_inputs, variants

if TYPE_CHECKING:
    import onnxruntime

ROUNDING_FACTOR = 16
"""How many times torch's own rounding error two correct runtimes may differ.

Both round every operation, in another order and with other approximations of exp, erf and tanh;
measured on the architectures in tests/zoo.py the ratio stayed below 5.
"""

LARGEST_DRIFT = 0.25
"""How far apart, relative in norm, two correct runtimes may be of a model in integers."""

_WORD = re.compile(r"[A-Za-z_]\w*")

CPU_PROVIDER = "CPUExecutionProvider"

VARIANTS = 3
"""Sets of inputs other than the example that every comparison covers, at least."""


@dataclass(frozen=True)
class Comparison:
    """One output at one set of inputs.

    Attributes:
        output: Name of the output.
        shapes: Input names and their shapes.
        difference: Largest absolute difference between ONNX Runtime and torch; its root mean
            square if layers round to integers.
        bound: Largest difference that rounding explains (see `compare`).
        mismatch: What else differs (shape, type, where NaN or infinity is), empty if nothing.
    """

    output: str
    shapes: Mapping[str, tuple[int, ...]]
    difference: float
    bound: float
    mismatch: str = ""

    @property
    def failure(self) -> str | None:
        """One sentence if the output differs, else None."""
        where = f"output {self.output!r} at {_shapes_text(self.shapes)}"
        if self.mismatch:
            return f"{where} differs from torch: {self.mismatch}"
        if self.difference <= self.bound:
            return None
        return (
            f"{where} differs from torch by {self.difference:.3g}, "
            f"and rounding explains at most {self.bound:.3g}"
        )


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


def session(
    model: str | Path | bytes, threads: int | None = None, *, provider: str = CPU_PROVIDER
) -> onnxruntime.InferenceSession:
    """Load an ONNX model.

    Args:
        model: The file, with external data beside it, or a file's content.
        threads: Threads inside one operation; default: as many as torch uses.
        provider: The execution provider.

    Raises:
        CheckpointError: if there is no such file, or ONNX Runtime cannot load it.
        MissingExtraError: if onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "running ONNX files needs onnxruntime: pip install onnxruntime"
        ) from error
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise CheckpointError(f"there is no ONNX file at {model}")
    content = model if isinstance(model, bytes) else str(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(content, options, providers=[provider])
    except Exception as error:
        what = "the model" if isinstance(model, bytes) else model
        raise CheckpointError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {what}: {first_line(error)}"
        ) from error


def run(
    runtime: onnxruntime.InferenceSession, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run a session on named tensors and return its outputs by name.

    Raises:
        ExportError: if ONNX Runtime cannot run the file on these inputs.
    """
    names = [argument.name for argument in runtime.get_inputs()]
    missing = sorted(set(names) - set(inputs))
    if missing:
        raise ExportError(f"the ONNX file wants the inputs {names}, and {missing} were not given")
    try:
        feed = {name: inputs[name].detach().cpu().numpy() for name in names}
        results = runtime.run(None, feed)
    except Exception as error:
        shapes = _shapes_text({name: tuple(inputs[name].shape) for name in names})
        raise ExportError(f"ONNX Runtime fails at {shapes}: {first_line(error)}") from error
    outputs = (output.name for output in runtime.get_outputs())
    return {
        name: torch.from_numpy(np.asarray(result))
        for name, result in zip(outputs, results, strict=True)
    }


def compare(
    output: str,
    shapes: Mapping[str, tuple[int, ...]],
    actual: torch.Tensor,
    expected: torch.Tensor,
    exact: torch.Tensor,
    unit_roundoff: float,
    integer_roundoff: float = 0.0,
) -> Comparison:
    """Compare one output of ONNX Runtime with torch's.

    A floating-point output may differ by
    `min(16 * max(torch's rounding error, u * scale), sqrt(u) * scale)`, all in the maximum norm:
    the rounding error is measured against float64 arithmetic, u is the unit roundoff and scale
    the largest absolute value. The second term stands in where torch rounds by luck hardly at
    all, and the last one keeps an ill-conditioned model from excusing everything. Integers and
    booleans, and the places of NaN and infinity, must be equal.

    Where layers round to integers, a value that differs in the last bit may round to the
    neighbouring one, and that makes more of them in the next layer: two correct runtimes end as far
    apart as rounding noise is large, and some elements by much more. Root mean squares are compared
    there, with 16 times the noise, a quarter of the output at most.

    Args:
        output: Name of the output.
        shapes: Input names and their shapes.
        actual: The output of ONNX Runtime.
        expected: The output of torch.
        exact: The output of torch in float64 arithmetic.
        unit_roundoff: Of the coarsest floating-point type that the model uses.
        integer_roundoff: Of all layers that round to integers together (see `integer_roundoff_of`).
    """
    mismatch = ""
    if actual.shape != expected.shape:
        mismatch = f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    elif actual.dtype != expected.dtype:
        mismatch = f"{actual.dtype} instead of {expected.dtype}"
    elif not torch.equal(_special_values(actual), _special_values(expected)):
        mismatch = "NaN or infinity in other places"
    if mismatch:
        return Comparison(output, shapes, float("inf"), 0.0, mismatch)
    finite = torch.isfinite(expected)
    wanted, found = expected[finite].to(torch.float64), actual[finite].to(torch.float64)
    difference = _largest(found - wanted)
    if not expected.is_floating_point():
        return Comparison(output, shapes, difference, 0.0)
    if integer_roundoff:
        bound = min(ROUNDING_FACTOR * integer_roundoff, LARGEST_DRIFT) * _root_mean_square(wanted)
        return Comparison(output, shapes, _root_mean_square(found - wanted), bound)
    scale = _largest(wanted)
    rounding = _largest(exact[finite].to(torch.float64).nan_to_num(0.0) - wanted)
    bound = min(ROUNDING_FACTOR * max(rounding, unit_roundoff * scale), unit_roundoff**0.5 * scale)
    return Comparison(output, shapes, difference, bound)


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
        try:
            with torch.no_grad():
                expected = flat(*tensors)
        except Exception:
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


def arguments_for(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Return canonical arguments for example inputs, inferring them if None.

    Raises:
        InputError: if they do not fit the model or cannot be inferred.
    """
    if example_inputs is None:
        return infer_inputs(model)
    return example_arguments(model, example_inputs)


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


def _special_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return 0 for finite values, 1 for NaN, 2 and 3 for the infinities."""
    kinds = torch.isnan(tensor).to(torch.uint8)
    if tensor.is_floating_point():
        kinds = kinds + 2 * torch.isposinf(tensor) + 3 * torch.isneginf(tensor)
    return kinds


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def unit_roundoff_of(flat: FlatModel) -> float:
    """Return the unit roundoff of the coarsest floating-point type in a model."""
    kinds = {tensor.dtype for tensor in (*flat.parameters(), *flat.example)}
    kinds = {kind for kind in kinds if kind.is_floating_point} or {torch.float32}
    return max(torch.finfo(kind).eps for kind in kinds) / 2


def integer_roundoff_of(flat: FlatModel) -> float:
    """Return the relative error of all layers that round to integers together, 0 without any.

    A random walk: the layers' own errors are independent, and their variances add up.
    """
    modules = (float(getattr(module, "unit_roundoff", 0.0)) for module in flat.modules())
    return math.hypot(*modules)


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def _shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
