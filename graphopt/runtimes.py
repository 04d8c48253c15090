"""The runtimes that ONNX files are served by: run a file in each, and say which is faster."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from graphopt.passes.errors import CheckpointError, ConfigError, ExportError, MissingExtraError
from graphopt.passes.stopwatch import interleaved_ms
from graphopt.passes.verifier import relative_error

from .flat_model import FlatModel, first_line
from .onnx_comparison import (
    LARGEST_DRIFT,
    ROUNDING_FACTOR,
    integer_roundoff_of,
    unit_roundoff_of,
)
from .onnx_runtime import run, session

Runner = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
"""Runs a file on named tensors and returns its outputs by name."""

BUDGET_S = 0.2
"""Seconds that a file is timed in each runtime."""

_UNIT_ROUNDOFF = {"f32": 2.0**-24, "bf16": 2.0**-8}


@dataclass(frozen=True)
class RuntimeTime:
    """How long a file takes in one runtime.

    Attributes:
        runtime: As in `load_onnx`: the name, and the precision of floating point if not float32.
        version: Of the runtime.
        latency_ms: Median of a call at the example's shapes, NaN if it is not usable.
        difference: Of the outputs from torch's, in norm, relative, the worst of them.
        problem: Why the runtime is not to be used for this file, else None.
    """

    runtime: str
    version: str
    latency_ms: float
    difference: float
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the time as plain data."""
        return {**asdict(self), "latency_ms": None if self.problem else self.latency_ms}

    def __str__(self) -> str:
        """Return name and latency, or what is wrong."""
        if self.problem is not None:
            return f"{self.runtime} not usable ({self.problem})"
        return f"{self.runtime} {self.latency_ms:.3g} ms"


@functools.cache
def runtime_names() -> tuple[str, ...]:
    """Return the runtimes that are installed, in the precisions that this processor is fast at."""
    names = ["onnxruntime"] if importlib.util.find_spec("onnxruntime") else []
    if importlib.util.find_spec("openvino"):
        import openvino

        types = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        names += ["openvino", *(["openvino bf16"] if "BF16" in types else [])]
    return tuple(names)


def load_onnx(path: str | Path, runtime: str, *, threads: int | None = None) -> Runner:
    """Load an ONNX file in a runtime on the CPU.

    Args:
        path: The file.
        runtime: "onnxruntime", "openvino" (in float32) or "openvino bf16".
        threads: Threads inside one operation; default: as many as torch uses.

    Raises:
        CheckpointError: if there is no such file or the runtime cannot load it.
        ConfigError: if there is no such runtime.
        MissingExtraError: if it is not installed.
    """
    if runtime == "onnxruntime":
        return functools.partial(run, session(path, threads))
    if runtime in ("openvino", "openvino bf16"):
        return _openvino_runner(Path(path), _precision(runtime), threads)
    raise ConfigError(f"a runtime is 'onnxruntime', 'openvino' or 'openvino bf16', got {runtime!r}")


def time_runtimes(
    flat: FlatModel, path: Path, *, budget_s: float = BUDGET_S
) -> tuple[RuntimeTime, ...]:
    """Time a file in every runtime that is installed, in turns, at the example's shapes.

    The outputs of each are compared with torch's (see `_problem`). A runtime that fails or differs
    is no error: it is listed with the problem, after the others.

    Args:
        flat: The model, in evaluation mode.
        path: The file.
        budget_s: Seconds to spend on each, about.

    Returns:
        The times, fastest first.
    """
    with torch.no_grad():
        wanted = dict(zip(flat.output_names, flat(*flat.example), strict=True))
    feed = dict(zip(flat.input_names, flat.example, strict=True))
    checked: list[RuntimeTime] = []
    calls: list[Callable[[], Any]] = []
    for runtime in runtime_names():
        version = metadata.version(runtime.partition(" ")[0])
        try:
            runner = load_onnx(path, runtime)
            found = runner(feed)
        except (CheckpointError, ExportError) as error:
            checked.append(RuntimeTime(runtime, version, math.nan, math.inf, str(error)))
            continue
        roundoff = max(unit_roundoff_of(flat), _UNIT_ROUNDOFF[_precision(runtime)])
        bound = max(roundoff**0.5, min(ROUNDING_FACTOR * integer_roundoff_of(flat), LARGEST_DRIFT))
        drifts = {name: _drift(found[name], wanted[name].cpu()) for name in wanted}
        problem = _problem(drifts, bound)
        checked.append(RuntimeTime(runtime, version, math.nan, max(drifts.values()), problem))
        if problem is None:
            calls.append(functools.partial(runner, feed))
    times = iter(interleaved_ms(calls, torch.device("cpu"), budget_s) if calls else [])
    timed = [
        item if item.problem else replace(item, latency_ms=median(next(times))) for item in checked
    ]
    return tuple(sorted(timed, key=lambda item: (item.problem is not None, item.latency_ms)))


def _drift(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return `||found - wanted|| / ||wanted||`; integers differ by choices that rounding made."""
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.is_floating_point():
        return 0.0
    finite = torch.isfinite(wanted)
    if not torch.equal(finite, torch.isfinite(found)):
        return math.inf
    return relative_error(found[finite].double(), wanted[finite].double())


def _problem(drifts: Mapping[str, float], bound: float) -> str | None:
    """Say which output is too far from torch's.

    Half of the digits may be lost to rounding, `sqrt(u)` for a unit roundoff u, and what layers in
    integers explain (see `onnx_comparison.compare`).
    """
    for name, drift in drifts.items():
        if not drift <= bound:
            return (
                f"output {name!r} differs from torch by {drift:.2g} in norm, "
                f"and rounding explains at most {bound:.2g}"
            )
    return None


def _openvino_runner(path: Path, precision: str, threads: int | None) -> Runner:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(
            "running files in OpenVINO needs the extra openvino: pip install 'graphopt[openvino]'"
        ) from error
    if not path.is_file():
        raise CheckpointError(f"there is no ONNX file at {path}")
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads() if threads is None else threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()
    except Exception as error:
        raise CheckpointError(
            f"OpenVINO {metadata.version('openvino')} cannot load {path}: {first_line(error)}"
        ) from error
    names = {name for item in request.model_inputs for name in item.names}
    outputs = [sorted(item.names) for item in request.model_outputs]

    def infer(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        feed = {name: inputs[name].detach().cpu().numpy() for name in names if name in inputs}
        try:
            results = request.infer(feed, share_inputs=True)
        except Exception as error:
            raise ExportError(f"OpenVINO fails: {first_line(error)}") from error
        return {
            name: torch.from_numpy(result)
            for names_of_output, result in zip(outputs, results.values(), strict=True)
            for name in names_of_output
        }

    return infer


def _precision(runtime: str) -> str:
    return runtime.partition(" ")[2] or "f32"
