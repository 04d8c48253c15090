"""Measured times of dense parts and of what could replace them, kept in a file between runs."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from .stopwatch import interleaved_ms
from .structure import flatten

_logger = logging.getLogger(__name__)
_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A dense part and its candidate, timed in turns.

    Attributes:
        dense_ms: Median time of the dense part.
        candidate_ms: Median time of the candidate.
        ratio: Median over the turns of dense / candidate; above 1 the candidate is faster.
    """

    dense_ms: float
    candidate_ms: float
    ratio: float


class Costs:
    """Times on one device, each measured once per device, versions, threads and precision.

    The dense part and the candidate run in the same process, dtype and math library, at the
    user's own `torch.get_float32_matmul_precision()`, so that neither gets a faster matrix
    product than the other could have.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        device: torch.device | str = "cpu",
        budget_s: float = 0.2,
    ) -> None:
        """Read what was measured before.

        Args:
            path: A JSON file; None keeps the times in memory. A damaged file is ignored with a
                logged warning and replaced at the next measurement.
            device: Where parts run.
            budget_s: Seconds to spend on each part of a comparison, about.
        """
        self.device = torch.device(device)
        self._path = path
        self._budget_s = budget_s
        self._times: dict[str, list[float]] = _read(path) if path is not None else {}

    def measure(
        self, key: str, dense: Callable[[], Any], candidate: Callable[[], Any]
    ) -> Comparison:
        """Time two functions in turns, or return what was measured under this key before.

        Args:
            key: Identifies the two; device, versions, threads and precision are added.
            dense: Runs the dense part once.
            candidate: Runs what would take its place once.
        """
        times = self._cached(f"{key} [compared]", 3, lambda: self._turns(dense, candidate))
        return Comparison(dense_ms=times[0], candidate_ms=times[1], ratio=times[2])

    def compare_modules(
        self,
        dense: nn.Module,
        candidate: nn.Module,
        input_shape: Sequence[int],
        dtype: torch.dtype,
        *,
        training: bool,
    ) -> Comparison:
        """Time a module and its replacement on an input of one shape.

        Both run as copies, filled with random numbers where they are on the meta device;
        parameters, gradients, buffers and the random generators stay as they are.

        Args:
            dense: The module of the model.
            candidate: What would take its place.
            input_shape: Shape of its one input.
            dtype: Type of that input; integers are all 0.
            training: Time a forward and a backward pass in training mode, else a forward pass
                in evaluation mode without gradients.
        """

        def times() -> list[float]:
            with torch.random.fork_rng(self._generators()):
                return self._turns(
                    self._runner(dense, input_shape, dtype, training),
                    self._runner(candidate, input_shape, dtype, training),
                )

        key = " vs ".join(
            _signature(module, input_shape, dtype, training) for module in (dense, candidate)
        )
        found = self._cached(f"{key} [compared]", 3, times)
        return Comparison(dense_ms=found[0], candidate_ms=found[1], ratio=found[2])

    def module_latency_ms(
        self, module: nn.Module, input_shape: Sequence[int], dtype: torch.dtype, *, training: bool
    ) -> float:
        """Return the median time of one module alone; arguments as in `compare_modules`."""

        def times() -> list[float]:
            with torch.random.fork_rng(self._generators()):
                run = self._runner(module, input_shape, dtype, training)
                return [median(interleaved_ms((run,), self.device, self._budget_s)[0])]

        return self._cached(_signature(module, input_shape, dtype, training), 1, times)[0]

    def _turns(self, dense: Callable[[], Any], candidate: Callable[[], Any]) -> list[float]:
        turns = interleaved_ms((dense, candidate), self.device, self._budget_s)
        ratios = [first / second for first, second in zip(*turns, strict=True)]
        return [*map(median, turns), median(ratios)]

    def _cached(self, key: str, count: int, times: Callable[[], list[float]]) -> list[float]:
        key = f"{_environment(self.device)} | {key}"
        found = self._times.get(key)
        if found is None or len(found) != count:
            found = self._times[key] = times()
            if self._path is not None:
                self._times = {**_read(self._path), **self._times}
                _write(self._path, self._times)
        return found

    def _generators(self) -> list[int]:
        if self.device.type != "cuda":
            return []
        return [torch.cuda.current_device() if self.device.index is None else self.device.index]

    def _runner(
        self, module: nn.Module, input_shape: Sequence[int], dtype: torch.dtype, training: bool
    ) -> Callable[[], Any]:
        """Return a function that runs a copy of a module once."""
        twin = _materialized(copy.deepcopy(module), self.device).train(training)
        if not dtype.is_floating_point:
            value = torch.zeros(tuple(input_shape), dtype=dtype, device=self.device)
        else:
            value = torch.randn(tuple(input_shape), dtype=dtype, device=self.device)
        if not training:

            def infer() -> Any:
                with torch.no_grad():
                    return twin(value)

            return infer
        wanted: list[torch.Tensor] = [
            parameter for parameter in twin.parameters() if parameter.requires_grad
        ]
        if dtype.is_floating_point:
            wanted.append(value.requires_grad_())

        def step() -> Any:
            with torch.enable_grad():
                result = flatten(twin(value))[0][0]
                if not result.requires_grad:
                    return result
                return torch.autograd.grad(
                    result, wanted, torch.ones_like(result), allow_unused=True
                )

        return step


def default_cache_path() -> Path:
    """Return the file for measured times in the user's cache directory."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "graphopt" / "costs.json"


def _materialized(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to a device; what is on the meta device gets small random values."""
    if not any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return module.to(device)
    module = module.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02).abs_()
            else:
                tensor.zero_()
    return module


def _signature(
    module: nn.Module, input_shape: Sequence[int], dtype: torch.dtype, training: bool
) -> str:
    tensors = [
        f"{name}:{list(tensor.shape)}:{tensor.dtype}{':trained' * tensor.requires_grad}"
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    kind = type(module)
    mode = "training step" if training else "inference"
    text = " ".join(str(module).split())
    return (
        f"{kind.__module__}.{kind.__qualname__} {text} {' '.join(tensors)} "
        f"on {list(input_shape)}:{dtype} in a {mode}"
    )


def _environment(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return (
        f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"float32 products {torch.get_float32_matmul_precision()}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _read(path: Path) -> dict[str, list[float]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise ValueError(f"expected schema {_SCHEMA}, got {content['schema']!r}")
        times = {
            str(key): [float(item) for item in value] for key, value in content["times"].items()
        }
        if not all(math.isfinite(item) and item > 0 for value in times.values() for item in value):
            raise ValueError("a time is not a positive number")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _logger.warning("the file of measured times %s is ignored: %r", path, error)
        return {}
    return times


def _write(path: Path, times: dict[str, list[float]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"schema": _SCHEMA, "times": times}, file, indent=1, sort_keys=True)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        _logger.warning("measured times cannot be written to %s: %s", path, error)
