"""Measured times of dense parts and of what could replace them, kept in a file between runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from .cost_cache import CostCache, default_cache_path
from .errors import ConfigError, MissingExtraError
from .latency import Comparison, Estimate, predicted
from .roofline import COPIED_BYTES, Rates, predicted_ms, product_workload, rates_from
from .runners import Runner, TorchRunner, is_present
from .stopwatch import interleaved_ms
from .workload import Workload

__all__ = ["Comparison", "Costs", "Estimate", "default_cache_path"]

_logger = logging.getLogger(__name__)


class Costs:
    """Times on one device in one runtime, each measured once per device, versions and threads.

    The dense part and the candidate run in the same process, dtype and math library, at the
    user's own `torch.get_float32_matmul_precision()`, so that neither gets a faster matrix
    product than the other could have. Where the dense part cannot be measured (the device is not
    there, the memory is too small), times are predicted by the roofline model and say so.

    Attributes:
        runner: The runtime.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        device: torch.device | str = "cpu",
        runner: Runner | None = None,
        budget_s: float = 0.2,
    ) -> None:
        """Read what was measured before.

        Args:
            path: A JSON file (see `CostCache`); None keeps the times in memory.
            device: Where parts run in torch.
            runner: Another runtime for inference; default: torch on the device.
            budget_s: Seconds to spend on each part of a comparison, about.
        """
        self.runner: Runner = runner if runner is not None else TorchRunner(device)
        self._cache = CostCache(path)
        self._budget_s = budget_s
        self._unmeasurable: set[str] = set()
        self._last_dense: tuple[str, Callable[[], Any]] | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors of what is timed lie."""
        return self.runner.device

    def measure(
        self, key: str, dense: Callable[[], Any], candidate: Callable[[], Any]
    ) -> Comparison:
        """Time two functions in turns, or return what was measured under this key before.

        Args:
            key: Identifies the two; device, versions, threads and precision are added.
            dense: Runs the dense part once, in torch.
            candidate: Runs what would take its place once, in torch.
        """
        key = f"{TorchRunner(self.device).environment()} | {key} [compared]"
        return _comparison(self._cache.get(key, 5, lambda: self._turns(dense, candidate)))

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

        Args:
            dense: The module of the model.
            candidate: What would take its place.
            input_shape: Shape of its one input.
            dtype: Type of that input; integers are all 0.
            training: As in `compare`.
        """
        return self.compare(
            Workload.of_shape(dense, input_shape, dtype),
            Workload.of_shape(candidate, input_shape, dtype),
            training=training,
        )

    def compare(self, dense: Workload, candidate: Workload, *, training: bool) -> Comparison:
        """Time a workload and what would take its place in turns.

        Both run as copies, filled with random numbers where they are on the meta device;
        parameters, gradients, buffers and the random generators stay as they are. A candidate
        that does not run where the dense part does is infinitely slow.

        Args:
            dense: A part of the model.
            candidate: What would take its place.
            training: Time a forward and a backward pass in training mode, else a forward pass
                in evaluation mode without gradients.
        """
        key = " vs ".join(work.signature(training=training) for work in (dense, candidate))
        found = self.compare_prepared(
            key,
            lambda: self._prepared_dense(dense, training),
            lambda: self._prepared(candidate, training),
        )
        if found is not None:
            return found
        before = self.latency(dense, training=training)
        if before.source == "measured":
            return Comparison(dense_ms=before.latency_ms, candidate_ms=math.inf, ratio=0.0)
        after_ms = predicted_ms(candidate, self.rates(candidate.dtype), training=training)
        return predicted(before.latency_ms, after_ms)

    def compare_prepared(
        self,
        key: str,
        dense: Callable[[], Callable[[], Any]],
        candidate: Callable[[], Callable[[], Any]],
    ) -> Comparison | None:
        """Time two functions of the runtime in turns, or return what was measured before.

        Args:
            key: Identifies the two; device, runtime, versions and threads are added.
            dense: Makes the function that runs the dense part (see `Runner.prepare`); called only
                if nothing was measured before.
            candidate: The same for what would take its place.

        Returns:
            The times, None where they cannot be measured.
        """

        def times() -> list[float]:
            with _random_numbers_kept(self.device):
                return self._turns(dense(), candidate())

        found = self._measured(f"{key} [compared]", 5, times)
        return None if found is None else _comparison(found)

    def latency(self, work: Workload, *, training: bool) -> Estimate:
        """Return the median time of one workload alone; arguments as in `compare`."""

        def times() -> list[float]:
            with _random_numbers_kept(self.device):
                run = self._prepared(work, training)
                return [median(interleaved_ms((run,), self.device, self._budget_s)[0])]

        found = self._measured(work.signature(training=training), 1, times)
        if found is not None:
            return Estimate(latency_ms=found[0])
        time_ms = predicted_ms(work, self.rates(work.dtype), training=training)
        return Estimate(latency_ms=time_ms, source="predicted")

    def module_latency_ms(
        self, module: nn.Module, input_shape: Sequence[int], dtype: torch.dtype, *, training: bool
    ) -> float:
        """Return the median time of one module alone; arguments as in `compare_modules`."""
        work = Workload.of_shape(module, input_shape, dtype)
        return self.latency(work, training=training).latency_ms

    def rates(self, dtype: torch.dtype) -> Rates:
        """Return the device's rates, or the CPU's for a device that is not here."""
        torch_runner = TorchRunner(self.device if is_present(self.device) else "cpu")

        def times() -> list[float]:
            device = torch_runner.device
            with _random_numbers_kept(device):
                work = product_workload(dtype).on(device, training=False)
            source = torch.zeros(COPIED_BYTES // 4, device=device)
            target = torch.empty_like(source)
            product = torch_runner.prepare(work, training=False)
            copy = interleaved_ms((product, lambda: target.copy_(source)), device, self._budget_s)
            return [median(turns) for turns in copy]

        key = f"{torch_runner.environment()} | rates of {dtype}"
        return rates_from(*self._cache.get(key, 2, times))

    def _measured(
        self, key: str, count: int, times: Callable[[], list[float]]
    ) -> list[float] | None:
        """Return times from the cache or the clock, None where nothing can be measured."""
        key = f"{self.runner.environment()} | {key}"
        if key in self._unmeasurable:
            return None
        try:
            return self._cache.get(key, count, times)
        except (ConfigError, MissingExtraError):
            raise
        except Exception as error:
            _logger.warning("not measured on %s: %s: %s", self.device, type(error).__name__, error)
            self._unmeasurable.add(key)
            return None

    def _prepared_dense(self, work: Workload, training: bool) -> Callable[[], Any]:
        """Prepare a dense part, or return the last one again: its candidates come in a row."""
        key = f"{self.runner.environment()} | {work.signature(training=training)}"
        if self._last_dense is None or self._last_dense[0] != key:
            self._last_dense = key, self._prepared(work, training)
        return self._last_dense[1]

    def _prepared(self, work: Workload, training: bool) -> Callable[[], Any]:
        return self.runner.prepare(work.on(self.device, training=training), training=training)

    def _turns(self, dense: Callable[[], Any], candidate: Callable[[], Any]) -> list[float]:
        turns = interleaved_ms((dense, candidate), self.device, self._budget_s)
        ratios = [first / second for first, second in zip(*turns, strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        return [*map(median, turns), middle, low, high]


def _comparison(times: Sequence[float]) -> Comparison:
    """Return medians of the dense part and the candidate, and the quartiles of their ratio."""
    dense_ms, candidate_ms, ratio, low, high = times
    decided = not low <= 1 <= high
    return Comparison(dense_ms=dense_ms, candidate_ms=candidate_ms, ratio=ratio, decided=decided)


def _random_numbers_kept(device: torch.device) -> AbstractContextManager[None]:
    if device.type != "cuda":
        return torch.random.fork_rng([])
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.random.fork_rng([index])
