"""Dense against optimized, timed in turns: the medians, their spread, and the ratio of pairs."""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from graphopt.passes.calls import expand_arguments, signature_of
from graphopt.passes.errors import ConfigError, ExportError, GraphoptError
from graphopt.passes.plan import Plan
from graphopt.passes.structure import flatten, map_tensors, tensor_names
from graphopt.passes.verifier import preserved

from .bench_result import BenchResult, BenchRow, SiteTime
from .environment import environment
from .export import export_onnx
from .flat_model import arguments_for
from .onnx_runtime import session
from .runtime import installation_of
from .training.executed_flops import ExecutedFlops

_PRECISIONS = ("highest", "medium")
_SHORTEST_TURN_S = 0.01
_EXPORTED_ROWS = 2

Call = Callable[[], Any]


def bench(
    dense: nn.Module,
    optimized: nn.Module,
    *,
    example: Any = None,
    threads: int | None = None,
    repeats: int = 20,
    onnx: bool = True,
    training: bool = False,
    device: torch.device | str = "cpu",
) -> BenchResult:
    """Time two models in turns, in torch and in ONNX Runtime.

    A float32 model runs in torch with both settings of `torch.set_float32_matmul_precision` that
    matter, and the faster one counts, for either model: what one could have, the other has.
    The parts that were rewritten are listed with the times that `optimize` and `plan` took them by.

    Args:
        dense: The model as it was.
        optimized: The model it became.
        example: Inputs of both, as for `graphopt.optimize`; inferred from `dense` if None.
        threads: Threads inside one operation; default: as many as torch uses.
        repeats: Pairs of each comparison.
        onnx: Whether to export both and time them in ONNX Runtime on the CPU as well.
        training: Whether to time forward and backward in training mode as well.
        device: Where torch runs.

    Raises:
        ConfigError: if `repeats` or `threads` is below one.
        InputError: if the example does not fit or cannot be inferred.
    """
    for name, value in (("repeats", repeats), ("threads", threads)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    place = torch.device(device)
    models = [_on_device(model, place) for model in (dense, optimized)]
    arguments = map_tensors(arguments_for(models[0], example), lambda tensor: tensor.to(place))
    tensors, structure = flatten(arguments)
    notes: list[str] = []
    rows: list[BenchRow] = []
    with _threads(threads), preserved(models[0]), preserved(models[1]):
        for is_step in (False, True) if training else (False,):
            rows.append(_torch_row(models, arguments, repeats, place, is_step))
        if onnx:
            try:
                rows.append(_onnx_row(models, arguments, repeats))
            except GraphoptError as error:
                notes.append(f"not measured in ONNX Runtime: {error}")
        flops = [_flops(model, arguments) for model in models]
        installation = installation_of(optimized)
        plan = Plan() if installation is None else installation.plan
        return BenchResult(
            rows=tuple(rows),
            inputs={
                name: tuple(tensor.shape)
                for name, tensor in zip(tensor_names(structure), tensors, strict=True)
            },
            dense_dtype=_dtypes(models[0]),
            optimized_dtype=_dtypes(models[1]),
            dense_flops=flops[0],
            optimized_flops=flops[1],
            environment=environment(place),
            notes=tuple(notes),
            sites=tuple(_sites(plan)),
            sites_runtime=str(plan.recipe.get("runtime", "torch")),
        )


def _sites(plan: Plan, part: str = "") -> Iterator[SiteTime]:
    """Yield the changes that were timed by themselves, those of parts under their full names."""
    for change in plan.changes:
        dense_ms, optimized_ms = change.before.latency_ms, change.after.latency_ms
        if dense_ms is not None and optimized_ms is not None:
            yield SiteTime(
                target=part + change.target,
                pass_name=change.pass_name,
                dense_ms=dense_ms,
                optimized_ms=optimized_ms,
                source=change.after.latency_source or "measured",
            )
    for name, inner in plan.parts.items():
        yield from _sites(inner, f"{part}{name}.")


def _torch_row(
    models: Sequence[nn.Module],
    arguments: dict[str, Any],
    repeats: int,
    device: torch.device,
    is_step: bool,
) -> BenchRow:
    keys = [
        (index, precision)
        for index, model in enumerate(models)
        for precision in (_PRECISIONS if "float32" in _dtypes(model) else _PRECISIONS[:1])
    ]
    run = _step if is_step else _infer
    calls = []
    for index, precision in keys:
        models[index].train(is_step)
        calls.append(_with_precision(precision, run(models[index], arguments)))
    times = dict(zip(keys, _turns(calls, repeats, device), strict=True))
    best = [
        min((key for key in keys if key[0] == index), key=lambda key: median(times[key]))
        for index in range(len(models))
    ]
    return _row(
        "torch",
        "training step" if is_step else "inference",
        [times[key] for key in best],
        [key[1] for key in best],
    )


def _onnx_row(models: Sequence[nn.Module], arguments: dict[str, Any], repeats: int) -> BenchRow:
    tensors, structure = flatten(arguments)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as folder:
        calls: list[Call] = []
        for name, model in zip(("dense", "optimized"), models, strict=True):
            path = Path(folder) / f"{name}.onnx"
            _export(model, path, arguments)
            runtime = session(path, torch.get_num_threads())
            wanted = {argument.name for argument in runtime.get_inputs()}
            feed = {
                key: tensor.detach().cpu().numpy()
                for key, tensor in zip(tensor_names(structure), tensors, strict=True)
                if key in wanted
            }
            calls.append(functools.partial(runtime.run, None, feed))
        try:
            times = _turns(calls, repeats, cpu)
        except Exception as error:
            raise ExportError(f"ONNX Runtime fails: {error}") from error
    return _row("onnxruntime", "inference", times, ["", ""])


def _export(model: nn.Module, path: Path, arguments: dict[str, Any]) -> None:
    """Export a model at two rows, where the batch stays open: comparing there costs less."""
    tensors, _ = flatten(arguments)
    rows = max((tensor.shape[0] for tensor in tensors if tensor.dim()), default=0)
    few = map_tensors(
        arguments, lambda t: t[:_EXPORTED_ROWS] if t.dim() and t.shape[0] == rows else t
    )
    try:
        written = export_onnx(model, path, few, measure=False)
        if all(0 in sizes for sizes in written.dynamic.values()):
            return
    except GraphoptError:
        pass  # what fails at two rows may work at the example's own
    export_onnx(model, path, arguments, measure=False)


def _row(
    runtime: str, mode: str, times: Sequence[Sequence[float]], precisions: Sequence[str]
) -> BenchRow:
    ratios = [dense / optimized for dense, optimized in zip(*times, strict=True)]
    (dense_low, dense_ms, dense_high), (low, optimized_ms, high), (ratio_low, ratio, ratio_high) = (
        _quartiles(values) for values in (*times, ratios)
    )
    return BenchRow(
        runtime=runtime,
        mode=mode,
        dense_ms=dense_ms,
        dense_low_ms=dense_low,
        dense_high_ms=dense_high,
        optimized_ms=optimized_ms,
        optimized_low_ms=low,
        optimized_high_ms=high,
        ratio=ratio,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        dense_precision=precisions[0],
        optimized_precision=precisions[1],
        turns=len(ratios),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _turns(calls: Sequence[Call], repeats: int, device: torch.device) -> list[list[float]]:
    """Return the milliseconds of each call in each turn; every other turn goes backwards.

    Short calls run several times in one turn, so that a turn is long against the clock.
    """
    for call in calls:
        _seconds(call, 1, device)
    counts = [max(1, int(_SHORTEST_TURN_S / _seconds(call, 1, device))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats):
        order = range(len(calls))
        for index in order if turn % 2 == 0 else reversed(order):
            seconds = _seconds(calls[index], counts[index], device)
            times[index].append(1e3 * seconds / counts[index])
    return times


def _seconds(call: Call, count: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _infer(model: nn.Module, arguments: dict[str, Any]) -> Call:
    args, kwargs = expand_arguments(signature_of(model), arguments)

    def infer() -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    return infer


def _step(model: nn.Module, arguments: dict[str, Any]) -> Call:
    args, kwargs = expand_arguments(signature_of(model), arguments)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        outputs = flatten(model(*args, **kwargs))[0]
        reached = [value for value in outputs if value.requires_grad]
        torch.autograd.grad(
            reached, wanted, [torch.ones_like(value) for value in reached], allow_unused=True
        )

    return step


def _with_precision(precision: str, call: Call) -> Call:
    def run() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            call()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model, or a copy of it if it lies on another device."""
    here = all(parameter.device.type == device.type for parameter in model.parameters())
    return model if here else copy.deepcopy(model).to(device)


def _flops(model: nn.Module, arguments: dict[str, Any]) -> int:
    """Count what one inference executes: packed rows and gated tokens are known only then."""
    args, kwargs = expand_arguments(signature_of(model), arguments)
    model.eval()
    with torch.no_grad(), ExecutedFlops() as executed:
        model(*args, **kwargs)
    return int(executed.flops)


def _dtypes(model: nn.Module) -> str:
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return ", ".join(sorted(kinds)) or "no parameters"
