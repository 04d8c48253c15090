"""Write a model as an ONNX file that was run and compared before it gets its name."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim

from graphopt.passes.errors import CheckpointError, ExportError
from graphopt.passes.registry import pass_named

from . import open_sizes
from .export_forms import export_forms
from .flat_model import FlatModel, arguments_for, evaluating, first_line
from .onnx_lowering import lower_for_runtimes
from .onnx_translation import OPSETS, plain_attention, quiet, translate
from .onnx_verification import VerifyReport, verify_flat
from .open_sizes import OpenSizes
from .runtime import installation_of
from .runtimes import RuntimeTime, runtime_names, time_runtimes

if TYPE_CHECKING:
    import onnx_ir

EXTERNAL_DATA_THRESHOLD_BYTES = 2**31 - 2**26
"""A protobuf file holds 2 GiB; 64 MiB of them are left to the graph."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked.

    Attributes:
        path: The ONNX file.
        opset: Its opset of the default domain.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        dynamic: For each input, its open dimensions and the names of their sizes.
        size_bytes: Size of the file and its external data.
        verification: The comparison with torch.
        times: The file's latency at the example's shapes in every runtime that is installed,
            fastest first; empty if there is one only, or nothing was measured.
        notes: What a user should know: fixed sizes, and attempts that failed.
    """

    path: Path
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: OpenSizes
    size_bytes: int
    verification: VerifyReport
    notes: tuple[str, ...]
    times: tuple[RuntimeTime, ...] = ()

    @property
    def fastest(self) -> RuntimeTime | None:
        """The fastest runtime that gives right outputs, None if nothing was measured."""
        return next((time for time in self.times if time.problem is None), None)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "path": str(self.path),
            "opset": self.opset,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "dynamic": {
                name: {str(index): size for index, size in sizes.items()}
                for name, sizes in self.dynamic.items()
            },
            "size_bytes": self.size_bytes,
            "verification": self.verification.to_json(),
            "times": [time.to_json() for time in self.times],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Return the report as a few lines."""
        sizes = [
            f"{name} [{', '.join(f'{index}: {size}' for index, size in dimensions.items())}]"
            for name, dimensions in self.dynamic.items()
            if dimensions
        ]
        lines = [
            f"{self.path}: {self.size_bytes / 2**20:.1f} MiB, opset {self.opset}",
            f"  inputs {', '.join(self.inputs)}; outputs {', '.join(self.outputs)}",
            f"  open sizes: {', '.join(sizes) or 'none'}",
            f"  {self.verification}",
            *([f"  fastest: {', '.join(map(str, self.times))}"] if self.times else []),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any = None,
    *,
    opset: int | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    metadata: Mapping[str, str] | None = None,
    external_data_threshold_bytes: int = EXTERNAL_DATA_THRESHOLD_BYTES,
    measure: bool = True,
) -> ExportReport:
    """Export a model to ONNX, run the file in ONNX Runtime, and keep it only if it is right.

    The model is exported in evaluation mode and left in its own. Batch and sequence sizes stay
    open where the model allows it; inputs carry the names of the forward's arguments. Outputs are
    compared with torch on the example and on at least three other inputs (see
    `onnx_comparison.compare` for the bound). Only then the file gets its name. Modules with
    operators that ONNX lacks are written in their export form (see `export_forms`), and compared as
    they are; operators that runtimes are slow at are replaced (see `onnx_lowering`). Where OpenVINO
    is installed too, the file is timed in both, and the report names the faster one.

    Args:
        model: Any model.
        path: Where to write, ending in `.onnx`; missing folders are made.
        example_inputs: A tensor, a tuple, or a dict of keyword arguments; inferred if None.
        opset: ONNX opset; default: the first of `OPSETS` that works.
        dynamic: For each input, the dimensions to keep open and the names of their sizes;
            default: the batch and whatever may be a sequence.
        metadata: More entries for the file's `metadata_props`.
        external_data_threshold_bytes: More weights than this go to `<name>.onnx.data` beside it.
        measure: Whether to time the file in the runtimes that are installed, if there are several.

    Raises:
        ExportError: if the path cannot be written, torch cannot export the model, or ONNX Runtime
            cannot run it or gives other outputs. No file is left, an existing one not touched.
        InputError: if the example inputs do not fit or cannot be inferred.
    """
    target = _checked_target(Path(path))
    arguments = arguments_for(model, example_inputs)
    properties = _provenance() | dict(metadata or {})
    opsets = OPSETS if opset is None else (opset,)
    with evaluating(model), quiet(), _draft_beside(target) as draft:
        flat = FlatModel(model, arguments)
        wanted = (
            open_sizes.candidates(flat) if dynamic is None else open_sizes.requested(dynamic, flat)
        )
        failures: list[Exception] = []
        for sizes, program, version in _attempts(flat, wanted, opsets, failures):
            try:
                names = open_sizes.size_names(program, sizes)
                translated = translate(program, flat.input_names, flat.output_names, version)
                _name_sizes(translated, names)
                lower_for_runtimes(translated)
                translated.metadata_props.update({**properties, "opset": str(version)})
                _save(translated, draft, external_data_threshold_bytes)
                verification = verify_flat(flat, draft)
            except (ExportError, CheckpointError) as error:
                failures.append(error)
                continue
            if verification.failure is not None:
                failures.append(ExportError(verification.failure))
                if verification.fails_on_example and version == opsets[-1]:
                    break  # no choice of sizes can mend it
                continue
            found = open_sizes.found_sizes(program, sizes, names)
            times = time_runtimes(flat, draft) if measure and len(runtime_names()) > 1 else ()
            return ExportReport(
                path=target,
                opset=version,
                inputs=tuple(flat.input_names),
                outputs=tuple(flat.output_names),
                dynamic=found,
                size_bytes=_publish(draft, target),
                verification=replace(verification, path=target),
                notes=(
                    *_left_out(model),
                    *open_sizes.static_notes(flat, wanted, found, failures),
                ),
                times=times,
            )
    raise ExportError(
        f"{type(model).__name__} was not exported to {target}: {failures[0]}"
    ) from failures[0]


def _left_out(model: nn.Module) -> list[str]:
    """Say which changes are not in the file, because they do nothing in evaluation mode.

    The graph is traced in that mode, where their operations are not run.
    """
    installation = installation_of(model)
    plans = [] if installation is None else [installation.plan, *installation.plan.parts.values()]
    changes = [record.change for plan in plans for record in plan.changes]
    names = [c.pass_name for c in changes if pass_named(c.pass_name).trains_only(c)]
    return [f"{name} acts in training only and is not in the file" for name in dict.fromkeys(names)]


def _checked_target(target: Path) -> Path:
    if target.is_dir():
        raise ExportError(f"{target} is a folder; pass the path of a file that ends in .onnx")
    if target.suffix != ".onnx":
        raise ExportError(f"the path of an ONNX file ends in .onnx, got {str(target)!r}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"cannot make the folder {target.parent}: {error.strerror}") from error
    return target


@contextmanager
def _draft_beside(target: Path) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder on the same file system."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".graphopt-", dir=target.parent)
    except OSError as error:
        raise ExportError(f"cannot write to {target.parent}: {error.strerror}") from error
    with folder as name:
        yield Path(name) / target.name


def _attempts(
    flat: FlatModel, wanted: OpenSizes, opsets: tuple[int, ...], failures: list[Exception]
) -> Iterator[tuple[OpenSizes, torch.export.ExportedProgram, int]]:
    """Yield ATen graphs with ever fewer dimensions open, each with every opset; note failures."""
    for sizes in open_sizes.narrowed(wanted):
        try:
            program = _trace(flat, sizes)
        except ExportError as error:
            failures.append(error)
        else:
            yield from ((sizes, program, version) for version in opsets)


def _trace(flat: FlatModel, sizes: OpenSizes) -> torch.export.ExportedProgram:
    """Turn a flat model into an ATen graph, with the given dimensions open where possible."""
    tensors = open_sizes.traceable_example(flat, sizes)
    shapes = tuple(
        {index: Dim.AUTO if index in sizes[name] else Dim.STATIC for index in range(tensor.dim())}
        for name, tensor in zip(flat.input_names, tensors, strict=True)
    )
    try:
        with torch.no_grad(), plain_attention(), export_forms(flat):
            return torch.export.export(flat, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        raise ExportError(f"torch.export cannot trace the model: {first_line(error)}") from error


def _name_sizes(model: onnx_ir.Model, names: Mapping[str, str]) -> None:
    """Give open sizes their readable names, wherever the model has them."""
    values = [*model.graph.inputs, *model.graph.outputs]
    values += [value for node in model.graph.all_nodes() for value in node.outputs]
    for shape in (value.shape for value in values if value.shape is not None):
        for index, size in enumerate(shape):
            if not isinstance(size, int) and size.value is not None:
                name = open_sizes.renamed(size.value, names)
                shape[index] = int(name) if name.isdigit() else name


def _provenance() -> dict[str, str]:
    return {
        "producer": "graphopt",
        "graphopt_version": importlib.metadata.version("graphopt"),
        "torch_version": str(torch.__version__),
    }


def _save(model: onnx_ir.Model, path: Path, threshold_bytes: int) -> None:
    """Write a model; weights go to a file of their own if they are more than the threshold."""
    import onnx_ir

    weights = (value.const_value for value in model.graph.initializers.values())
    size_bytes = sum(weight.nbytes for weight in weights if weight is not None)
    external = f"{path.name}.data" if size_bytes > threshold_bytes else None
    try:
        onnx_ir.save(model, path, external_data=external)
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot write {path.name}: {first_line(error)}") from error


def _publish(draft: Path, target: Path) -> int:
    """Give a checked file its name, external data first, and return the size of both in bytes."""
    data, target_data = (path.with_name(f"{path.name}.data") for path in (draft, target))
    size_bytes = draft.stat().st_size + (data.stat().st_size if data.exists() else 0)
    try:
        if data.exists():
            data.replace(target_data)
        draft.replace(target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror}") from error
    return size_bytes
