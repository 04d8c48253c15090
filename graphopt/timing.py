"""Where and how candidates are timed: the device, the runtime, and the file that keeps times."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from graphopt.passes.costs import Costs, default_cache_path


def costs_for(model: nn.Module, runtime: str = "torch", cache: str | Path | None = None) -> Costs:
    """Return the measured times of a runtime on a model's device.

    Args:
        model: Parts of a model on the meta device are timed on the CPU.
        runtime: "torch", "onnxruntime", or "onnxruntime:" and the name of an execution provider,
            as in recipes. ONNX Runtime times inference only.
        cache: File that keeps the times; default: one in the user's cache directory, which
            `optimize`, `plan` and `bench` share. Where it cannot be written, times are kept in
            memory.

    Raises:
        ConfigError: if ONNX Runtime has no such execution provider.
        MissingExtraError: if the runtime is not installed.
    """
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    device = next(iter(devices), torch.device("cpu"))
    path = default_cache_path() if cache is None else Path(cache)
    if runtime == "torch":
        return Costs(path, device=device)
    from .onnx_timing import OnnxRunner

    return Costs(path, runner=OnnxRunner(runtime.partition(":")[2]))
