"""Load and run ONNX files in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from graphopt.passes.errors import CheckpointError, ExportError, MissingExtraError

from .flat_model import first_line

if TYPE_CHECKING:
    import onnxruntime

CPU_PROVIDER = "CPUExecutionProvider"


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
        shapes = shapes_text({name: tuple(inputs[name].shape) for name in names})
        raise ExportError(f"ONNX Runtime fails at {shapes}: {first_line(error)}") from error
    outputs = (output.name for output in runtime.get_outputs())
    return {
        name: torch.from_numpy(np.asarray(result))
        for name, result in zip(outputs, results, strict=True)
    }


def shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return input names with their shapes, as sentences name them."""
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
