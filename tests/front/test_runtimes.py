"""Files are run in every runtime that is installed, and the faster one is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphopt.export import export_onnx
from graphopt.flat_model import FlatModel, evaluating
from graphopt.passes.errors import CheckpointError, ConfigError, ExportError, MissingExtraError
from graphopt.runtimes import RuntimeTime, load_onnx, runtime_names, time_runtimes

has_openvino = "openvino" in runtime_names()
needs_openvino = pytest.mark.skipif(not has_openvino, reason="the extra openvino")
RUNTIMES = [
    pytest.param("onnxruntime"),
    pytest.param("openvino", marks=needs_openvino),
]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        result = self.norm(self.body(x))
        return {"states": result, "best": result.argmax(-1)}


@pytest.fixture
def example() -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier().eval()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_gives_the_models_outputs(
    runtime: str, model: Classifier, example: Tensor, tmp_path: Path
) -> None:
    report = export_onnx(model, tmp_path / "model.onnx", example, measure=False)
    runner = load_onnx(report.path, runtime, threads=1)
    for rows in (example, torch.randn(7, 16)):
        expected = model(rows)
        found = runner({"x": rows})
        torch.testing.assert_close(found["states"], expected["states"].detach())
        assert torch.equal(found["best"], expected["best"])
    assert report.times == ()
    assert report.fastest is None


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_files_that_cannot_be_loaded_or_run_are_refused(
    runtime: str, model: Classifier, example: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no ONNX file at"):
        load_onnx(tmp_path / "missing.onnx", runtime)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="cannot load"):
        load_onnx(tmp_path / "bad.onnx", runtime)
    report = export_onnx(model, tmp_path / "model.onnx", example, measure=False)
    with pytest.raises(ExportError, match=r"fails|wants the inputs"):
        load_onnx(report.path, runtime)({"x": torch.randn(4, 15)})


def test_an_unknown_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a runtime is .* got 'tensorrt'"):
        load_onnx(tmp_path / "model.onnx", "tensorrt")


@pytest.mark.skipif(has_openvino, reason="openvino is installed")
def test_a_missing_runtime_names_its_extra(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"graphopt\[openvino\]"):
        load_onnx(tmp_path / "model.onnx", "openvino")


def test_every_runtime_is_timed_the_fastest_first(
    model: Classifier, example: Tensor, tmp_path: Path
) -> None:
    report = export_onnx(model, tmp_path / "model.onnx", example, measure=False)
    with evaluating(model):
        times = time_runtimes(FlatModel(model, {"x": example}), report.path, budget_s=0.02)
    assert {time.runtime for time in times} == set(runtime_names())
    assert [time.latency_ms for time in times] == sorted(time.latency_ms for time in times)
    for time in times:
        assert time.problem is None
        assert time.latency_ms > 0
        assert time.difference < (2.0**-4 if time.runtime.endswith("bf16") else 2.0**-12)


def test_a_runtime_with_other_outputs_is_not_the_fastest(
    model: Classifier, example: Tensor, tmp_path: Path
) -> None:
    report = export_onnx(model, tmp_path / "model.onnx", example, measure=False)
    with torch.no_grad():
        model.norm.bias.add_(1.0)
    with evaluating(model):
        times = time_runtimes(FlatModel(model, {"x": example}), report.path, budget_s=0.02)
    for time in times:
        assert "differs from torch" in str(time.problem)
        assert math.isnan(time.latency_ms)
        assert time.to_json()["latency_ms"] is None
        assert str(time).startswith(f"{time.runtime} not usable (output 'states'")


@needs_openvino
def test_an_export_names_the_faster_runtime(
    model: Classifier, example: Tensor, tmp_path: Path
) -> None:
    report = export_onnx(model, tmp_path / "model.onnx", example)
    assert report.fastest is report.times[0]
    line = next(line for line in str(report).splitlines() if "fastest" in line)
    assert line.strip().startswith(f"fastest: {report.fastest} ms"[:-3])
    assert len(report.to_json()["times"]) == len(runtime_names())


def test_a_time_says_runtime_and_latency() -> None:
    assert str(RuntimeTime("openvino bf16", "1", 3.214, 0.0)) == "openvino bf16 3.21 ms"
