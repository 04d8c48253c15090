"""Measured times: order, stability, no traces in the model, and the file between runs."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capture import capture
from graphopt.passes.axes import axes_of
from graphopt.passes.contraction_times import compare_sizes
from graphopt.passes.costs import Costs, default_cache_path
from graphopt.passes.region_times import region_workload
from graphopt.passes.runners import TorchRunner
from graphopt.passes.workload import Workload

ROWS = (256, 512)


def _layers() -> tuple[nn.Module, nn.Module]:
    """A layer, and one with an eighth of its work."""
    return nn.Linear(512, 1024), nn.Linear(512, 128)


@pytest.mark.parametrize("training", [False, True])
def test_less_work_is_faster(training: bool) -> None:
    dense, candidate = _layers()
    costs = Costs(budget_s=0.05)
    found = costs.compare_modules(dense, candidate, ROWS, torch.float32, training=training)
    assert found.ratio > 2
    assert found.dense_ms > found.candidate_ms


def test_equal_work_is_equally_fast() -> None:
    dense, _ = _layers()
    found = Costs().compare_modules(dense, dense, ROWS, torch.float32, training=False)
    assert 0.5 < found.ratio < 2


@pytest.mark.parametrize(("pauses_ms", "decided"), [((20, 20), True), ((20, 1), False)])
def test_turns_that_disagree_decide_nothing(pauses_ms: tuple[int, int], decided: bool) -> None:
    pauses = itertools.cycle(pauses_ms)
    found = Costs(budget_s=0.01).measure(
        str(pauses_ms), lambda: time.sleep(2e-3), lambda: time.sleep(1e-3 * next(pauses))
    )
    assert found.decided == decided
    assert found.is_slower == decided


def test_training_step_takes_longer_than_inference() -> None:
    dense, _ = _layers()
    costs = Costs(budget_s=0.05)
    step, forward = (
        costs.module_latency_ms(dense, ROWS, torch.float32, training=training)
        for training in (True, False)
    )
    assert step > 1.5 * forward


class Noting(TorchRunner):
    """Keeps the workloads that it times."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Workload] = []

    def prepare(self, work: Workload, *, training: bool) -> Callable[[], Any]:
        self.works.append(work)
        return super().prepare(work, training=training)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_convolutions_are_timed_in_the_order_of_memory_they_run_in(
    memory_format: torch.memory_format,
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2))
    nn.utils.convert_conv2d_weight_memory_format(net, memory_format)
    program = capture(net, torch.randn(2, 3, 9, 9).to(memory_format=memory_format))
    (group,) = (group for group in axes_of(program).groups() if group.prunable)
    noting = Noting()
    costs = Costs(runner=noting, budget_s=0.001)
    assert compare_sizes(program, group, 4, costs, training=True) is not None
    region = region_workload(program, program.calls("2"))
    costs.latency(region, training=True)
    tensors = [
        tensor
        for work in noting.works
        for tensor in (*work.module.parameters(), *work.inputs)
        if tensor.dim() == 4
    ]
    assert len(tensors) > 4
    assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in tensors)
    assert ("in memory" in region.signature(training=True)) == (
        memory_format is torch.channels_last
    )


def test_module_and_random_numbers_stay_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)).eval()
    module(torch.randn(4, 16)).sum().backward()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    state = torch.get_rng_state()
    with torch.no_grad():
        Costs(budget_s=0.01).module_latency_ms(module, (4, 16), torch.float32, training=True)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    after = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(after) == len(gradients) == 4
    assert all(torch.equal(a, b) for a, b in zip(after, gradients, strict=True))
    assert not any(part.training for part in module.modules())


def test_layers_without_memory_and_with_integer_inputs() -> None:
    with torch.device("meta"):
        layer, table = nn.Linear(16, 16), nn.Embedding(10, 16).requires_grad_(False)
    costs = Costs(budget_s=0.01)
    assert costs.module_latency_ms(layer, (4, 16), torch.float32, training=True) > 0
    assert costs.module_latency_ms(table, (4, 8), torch.long, training=True) > 0
    assert layer.weight.is_meta


def test_file_is_read_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "costs.json"
    calls: list[str] = []
    first = Costs(path, budget_s=0.001)
    measured = first.measure("a", lambda: calls.append("d"), lambda: calls.append("c"))
    assert {"d", "c"} == set(calls)
    calls.clear()
    again = Costs(path).measure("a", lambda: calls.append("d"), lambda: calls.append("c"))
    assert again == measured
    assert not calls
    Costs(path, budget_s=0.001).measure("b", lambda: calls.append("d"), lambda: None)
    assert calls
    assert [item.name for item in path.parent.iterdir()] == ["costs.json"]
    assert len(json.loads(path.read_text())["times"]) == 2


def test_two_runs_keep_each_others_times(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    one, other = Costs(path, budget_s=0.001), Costs(path, budget_s=0.001)
    one.measure("a", lambda: None, lambda: None)
    other.measure("b", lambda: None, lambda: None)
    assert len(json.loads(path.read_text())["times"]) == 2


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"schema": 99, "times": {}}',
        '{"schema": 1, "times": {"a": ["x"]}}',
        '{"schema": 1, "times": {"a": [-1.0]}}',
        '{"schema": 1, "times": {"a": 3}}',
    ],
)
def test_damaged_file_is_ignored_and_replaced(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        costs = Costs(path, budget_s=0.001)
    assert "is ignored" in caplog.text
    costs.measure("a", lambda: None, lambda: None)
    assert json.loads(path.read_text())["schema"] == 1


def test_unwritable_file_keeps_times_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    costs = Costs(tmp_path / "file" / "costs.json", budget_s=0.001)
    with caplog.at_level(logging.WARNING):
        first = costs.measure("a", lambda: None, lambda: None)
    assert "cannot be written" in caplog.text
    assert costs.measure("a", lambda: None, lambda: None) == first


def test_threads_and_shapes_are_measured_apart(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    costs, layer = Costs(path, budget_s=0.001), nn.Linear(8, 8)
    for shape, dtype in (((2, 8), torch.float32), ((4, 8), torch.float32)):
        costs.module_latency_ms(layer, shape, dtype, training=False)
    costs.module_latency_ms(layer, (2, 8), torch.float32, training=True)
    costs.module_latency_ms(layer.bfloat16(), (2, 8), torch.bfloat16, training=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        costs.module_latency_ms(layer, (2, 8), torch.bfloat16, training=False)
    finally:
        torch.set_num_threads(threads)
    assert len(json.loads(path.read_text())["times"]) == 5


def test_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_path() == tmp_path / "graphopt" / "costs.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert default_cache_path() == tmp_path / ".cache" / "graphopt" / "costs.json"
