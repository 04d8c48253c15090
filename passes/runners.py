"""Where workloads are timed: torch, or what the front hands in."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from .structure import flatten
from .workload import Workload


class Runner(Protocol):
    """A runtime that candidates are timed in.

    Attributes:
        name: As in recipes: "torch", "onnxruntime:CPUExecutionProvider".
        device: Where the tensors of workloads lie.
    """

    @property
    def name(self) -> str:
        """Name of the runtime, as in recipes."""

    @property
    def device(self) -> torch.device:
        """Where the tensors of workloads lie."""

    def environment(self) -> str:
        """Return what a time depends on besides the workload: processor, versions, threads."""

    def prepare(self, work: Workload, *, training: bool) -> Callable[[], Any]:
        """Return a function that runs a workload once.

        Args:
            work: On the device, in the wanted mode (see `Workload.on`).
            training: Whether it is to run forward and backward, else forward only.

        Raises:
            ConfigError: if the runtime does not train.
        """


class TorchRunner:
    """Runs modules eagerly, at the user's own precision of float32 products."""

    name = "torch"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Run on a device; it need not be there before something is prepared."""
        self.device = torch.device(device)

    def environment(self) -> str:
        """Return processor or GPU, torch's version, threads and precision."""
        return (
            f"{_device_name(self.device)}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, "
            f"float32 products {torch.get_float32_matmul_precision()}"
        )

    def prepare(self, work: Workload, *, training: bool) -> Callable[[], Any]:
        """Return a function that runs a workload once, in training with all its gradients."""
        module, inputs = work.module, work.inputs
        if not training:

            def infer() -> Any:
                with torch.no_grad():
                    return module(*inputs)

            return infer
        wanted = [tensor for tensor in (*module.parameters(), *inputs) if tensor.requires_grad]

        def step() -> Any:
            with torch.enable_grad():
                outputs = flatten(module(*inputs))[0]
                reached = [value for value in outputs if value.requires_grad]
                if not reached:
                    return outputs
                ones = [torch.ones_like(value) for value in reached]
                return torch.autograd.grad(reached, wanted, ones, allow_unused=True)

        return step


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def is_present(device: torch.device) -> bool:
    """Say whether this machine has a device."""
    return device.type != "cuda" or torch.cuda.is_available()


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return processor()
    return torch.cuda.get_device_name(device) if is_present(device) else f"an absent {device}"
