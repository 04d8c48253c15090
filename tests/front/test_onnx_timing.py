"""Candidates timed in ONNX Runtime: through their export form, under keys of their own."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.capture import capture
from graphopt.errors import ConfigError
from graphopt.kernels import LowRankLinear, QuantizedLinear
from graphopt.onnx_timing import OnnxRunner
from graphopt.passes.axes import axes_of
from graphopt.passes.contraction_times import compare_sizes
from graphopt.passes.costs import Costs
from graphopt.passes.workload import Workload
from graphopt.timing import costs_for

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "module",
    [nn.Linear(8, 6), LowRankLinear(8, 6, 2, True), nn.Sequential(nn.Linear(8, 8), nn.GELU())],
)
def test_what_is_timed_computes_what_the_module_computes(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    work = Workload(module, (torch.randn(3, 8),)).on(CPU, training=False)
    (found,) = OnnxRunner().prepare(work, training=False)()
    with torch.no_grad():
        expected = work.module(*work.inputs)
    # Products of at most 8 terms of size one, in float32.
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=8 * 8 * 2**-22)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8, "activations": "dynamic"},
        {"bits": 8, "activations": "static"},
        {"bits": 4, "activations": "none", "group_size": 32},
    ],
)
def test_integer_layers_are_timed_in_the_form_that_is_exported(options: dict[str, Any]) -> None:
    work = Workload.of_shape(
        QuantizedLinear(64, 32, device="meta", **options), (16, 64), torch.float32
    )
    (found,) = OnnxRunner().prepare(work.on(CPU, training=False), training=False)()
    assert found.shape == (16, 32)
    dense = Workload.of_shape(nn.Linear(64, 32), (16, 64), torch.float32)
    times = Costs(runner=OnnxRunner(), budget_s=0.001).compare(dense, work, training=False)
    assert times.ratio > 0
    assert times.source == "measured"


def test_times_are_kept_apart_by_runtime(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    layer, small = nn.Linear(64, 64), nn.Linear(64, 8)
    runtimes = (Costs(path, budget_s=0.001), Costs(path, runner=OnnxRunner(), budget_s=0.001))
    for costs in runtimes:
        found = costs.compare_modules(layer, small, (16, 64), torch.float32, training=False)
        assert found.source == "measured"
    keys = list(json.loads(path.read_text())["times"])
    assert len(keys) == 2
    assert sum("onnxruntime" in key and "CPUExecutionProvider" in key for key in keys) == 1


def test_a_part_is_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.json"
    layer = nn.Linear(8, 8)
    first = Costs(path, runner=OnnxRunner(), budget_s=0.001)
    time_ms = first.module_latency_ms(layer, (2, 8), torch.float32, training=False)
    monkeypatch.setattr(torch.export, "export", None)
    again = Costs(path, runner=OnnxRunner(), budget_s=0.001)
    assert again.module_latency_ms(layer, (2, 8), torch.float32, training=False) == time_ms


def test_contractions_read_their_activations_as_inputs() -> None:
    """Else ONNX Runtime would compute them while it loads the file."""
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    program = capture(model, torch.randn(4, 8))
    (group,) = (group for group in axes_of(program).groups() if group.size == 64)
    seen: list[int] = []

    class Watching(OnnxRunner):
        def prepare(self, work: Workload, *, training: bool) -> functools.partial[Any]:
            call = super().prepare(work, training=training)
            _, inputs = call.args
            seen.append(len(inputs))
            return call

    found = compare_sizes(
        program, group, 40, Costs(runner=Watching(), budget_s=0.001), training=False
    )
    assert found is not None
    assert found.source == "interpolated"
    assert seen
    assert all(inputs == 1 for inputs in seen)


def test_training_is_refused_with_a_sentence() -> None:
    costs = Costs(runner=OnnxRunner(), budget_s=0.001)
    with pytest.raises(ConfigError, match="training steps cannot be timed in ONNX Runtime"):
        costs.module_latency_ms(nn.Linear(2, 2), (1, 2), torch.float32, training=True)


def test_a_provider_that_is_not_here_is_refused_with_those_that_are() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"no TensorExecutionProvider; it has .*CPUExecution"):
        costs_for(model, "onnxruntime:TensorExecutionProvider")
    assert costs_for(model, "onnxruntime").runner.name == "onnxruntime:CPUExecutionProvider"
    assert costs_for(model).runner.name == "torch"


def test_optimize_and_plan_share_one_file_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs_for(nn.Linear(2, 2)).measure("a", lambda: None, lambda: None)
    assert (tmp_path / "graphopt" / "costs.json").is_file()


def test_a_home_that_cannot_be_written_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = costs_for(nn.Linear(2, 2)).measure("a", lambda: None, lambda: None)
    assert found.ratio > 0
