"""Workloads as small ONNX models, so that they are timed where they will be served."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from graphopt.passes.errors import CheckpointError, ConfigError, ExportError, MissingExtraError
from graphopt.passes.runners import processor
from graphopt.passes.workload import Workload

from .export_forms import export_forms
from .flat_model import first_line
from .onnx_lowering import lower_for_runtimes
from .onnx_runtime import CPU_PROVIDER, session
from .onnx_translation import OPSETS, plain_attention, quiet, translate


class OnnxRunner:
    """Runs inference in ONNX Runtime, with as many threads as torch has."""

    device = torch.device("cpu")

    def __init__(self, provider: str = "") -> None:
        """Choose an execution provider; default: the CPU's.

        Raises:
            ConfigError: if ONNX Runtime does not have it here.
            MissingExtraError: if onnxruntime is not installed.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError(
                "timing in ONNX Runtime needs onnxruntime: pip install onnxruntime"
            ) from error
        self._provider = provider or CPU_PROVIDER
        self._version: str = onnxruntime.__version__
        available = onnxruntime.get_available_providers()
        if self._provider not in available:
            raise ConfigError(
                f"this ONNX Runtime has no {self._provider}; it has {', '.join(available)}"
            )

    @property
    def name(self) -> str:
        """Name of the runtime, as in recipes."""
        return f"onnxruntime:{self._provider}"

    def environment(self) -> str:
        """Return processor, version, provider and threads."""
        return (
            f"{processor()}, onnxruntime {self._version}, {self._provider}, "
            f"{torch.get_num_threads()} threads"
        )

    def prepare(self, work: Workload, *, training: bool) -> functools.partial[Any]:
        """Return a call of ONNX Runtime that runs a workload once, from the first opset that works.

        Raises:
            ConfigError: if it is to train.
            ExportError: if the workload has no ONNX form.
            CheckpointError: if ONNX Runtime cannot load it.
        """
        if training:
            raise ConfigError(
                "training steps cannot be timed in ONNX Runtime; set the runtime to torch"
            )
        with quiet():
            traced = _traced(work)
            failures: list[Exception] = []
            for version in OPSETS:
                try:
                    content = translate(traced, None, None, version)
                    lower_for_runtimes(content)
                    runtime = session(_bytes(content), provider=self._provider)
                except (ExportError, CheckpointError) as error:
                    failures.append(error)
                    continue
                names = [argument.name for argument in runtime.get_inputs()]
                arrays = [value.detach().numpy() for value in work.inputs]
                return functools.partial(runtime.run, None, dict(zip(names, arrays, strict=True)))
        raise failures[0]


class _Whole(nn.Module):
    """Calls a module from outside: an export form takes the place of calls, not of a root."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.part(*inputs)


def _traced(work: Workload) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad(), plain_attention(), export_forms(work.module):
            return torch.export.export(_Whole(work.module).eval(), work.inputs, strict=False)
    except Exception as error:
        raise ExportError(f"torch.export cannot trace the part: {first_line(error)}") from error


def _bytes(model: Any) -> bytes:
    import onnx_ir

    content: bytes = onnx_ir.serde.serialize_model(model).SerializeToString()
    return content
