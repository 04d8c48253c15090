"""Timing: ratios mean what they say, models stay as they were, rows keep their origin."""

import copy
import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.bench import bench
from graphopt.bench_result import BenchResult, BenchRow
from graphopt.environment import environment, write_csv
from graphopt.errors import ConfigError


class SlowTwin(nn.Module):
    """Two linear layers with normalisation, as often as asked."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(times))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.norm(features)
        for layer in self.layers:
            features = layer(features).relu()
        return features


@pytest.fixture(scope="module")
def result() -> BenchResult:
    torch.manual_seed(0)
    models = SlowTwin(40).eval(), SlowTwin(1).train()
    before = [{name: value.clone() for name, value in m.state_dict().items()} for m in models]
    threads = torch.get_num_threads()
    found = bench(*models, example=torch.randn(256, 64), threads=1, repeats=5, training=True)
    for model, state in zip(models, before, strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert all(parameter.grad is None for parameter in model.parameters())
    assert [model.training for model in models] == [False, True]
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_num_threads() == threads
    return found


def test_a_faster_model_has_a_ratio_above_one_everywhere(result: BenchResult) -> None:
    assert [(row.runtime, row.mode) for row in result.rows] == [
        ("torch", "inference"),
        ("torch", "training step"),
        ("onnxruntime", "inference"),
    ]
    for row in result.rows:
        assert row.ratio > 1
        assert row.dense_ms > row.optimized_ms
        assert row.dense_low_ms <= row.dense_ms <= row.dense_high_ms
        assert row.turns == 5


def test_operations_are_counted_apart_from_time(result: BenchResult) -> None:
    linear = 2 * 256 * 64 * 64
    assert (result.dense_flops, result.optimized_flops) == (40 * linear, linear)
    assert result.flops_ratio == 40


def test_operations_that_depend_on_values_are_counted_as_they_run() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    tokens = torch.randn(3, 8, 16)
    padding = torch.arange(8) >= torch.tensor([[8], [3], [1]])
    example = {"src": tokens, "src_key_padding_mask": padding}
    packed = graphopt.optimize(copy.deepcopy(layers), example, recipe="pack-tokens", measure=False)
    found = bench(layers, packed, example=example, repeats=1, onnx=False)
    # 12 of 24 tokens are real: half of the linear layers, and less than half of the attention.
    assert found.optimized_flops <= found.dense_flops / 2


def test_the_result_says_how_it_was_measured(result: BenchResult) -> None:
    assert result.environment.threads == 1
    assert result.environment.torch == torch.__version__
    assert result.inputs == {"features": (256, 64)}
    assert {row.dense_precision for row in result.rows[:2]} <= {"highest", "medium"}
    text = str(result)
    assert "float32" in text
    assert "dense / optimized" in text
    assert json.loads(json.dumps(result.to_json()))["rows"][0]["runtime"] == "torch"


def test_double_precision_has_one_setting_and_fails_softly_in_onnx() -> None:
    class Unexportable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8).double()

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            scale = 1.0 if float(features.sum()) > 0 else -1.0
            result: torch.Tensor = self.layer(features) * scale
            return result

    example = torch.randn(4, 8, dtype=torch.float64)
    found = bench(Unexportable(), Unexportable(), example=example, repeats=1)
    assert [row.runtime for row in found.rows] == ["torch"]
    assert found.rows[0].dense_precision == "highest"
    assert any(note.startswith("not measured in ONNX Runtime") for note in found.notes)


def test_counts_below_one_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="repeats must be at least 1, got 0"):
        bench(model, model, repeats=0)
    with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
        bench(model, model, threads=0)


def test_rows_are_added_to_a_file_with_their_environment(
    tmp_path: Path, result: BenchResult
) -> None:
    path = tmp_path / "rows.csv"
    write_csv(path, result.rows, result.environment)
    write_csv(path, result.rows[:1], result.environment)
    with path.open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(result.rows) + 1
    assert float(read[0]["ratio"]) == result.rows[0].ratio
    assert read[0]["cpu"] == environment().cpu != ""
    assert list(read[0]) == [
        *(field.name for field in dataclasses.fields(BenchRow)),
        *(field.name for field in dataclasses.fields(result.environment)),
    ]
    path.write_text("other,columns\n1,2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"has the columns \['other', 'columns'\]"):
        write_csv(path, result.rows, result.environment)


def test_parts_are_listed_with_the_times_of_the_plan() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8)).eval()
    example = torch.randn(128, 512)
    small = graphopt.optimize(
        dense, example, recipe=["factorize-low-rank", "prune-channels"], budget="30%"
    )
    changes = [change for change in graphopt.report(small).kept if change.after is not None]
    found = bench(dense, small, example=example, repeats=1, onnx=False)
    assert [(site.target, site.optimized_ms) for site in found.sites] == [
        (change.target, change.after.latency_ms) for change in changes if change.after is not None
    ]
    assert found.sites
    assert all(site.optimized_ms < site.dense_ms for site in found.sites)
    assert found.to_json()["sites"][0]["target"] == found.sites[0].target
    assert "Parts by themselves, when the plan was made in torch" in str(found)


def test_models_without_a_plan_have_no_parts(result: BenchResult) -> None:
    assert not result.sites
    assert "Parts by themselves" not in str(result)
