"""Plan files: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capture import capture
from graphopt.passes.base import Context
from graphopt.passes.compress.prune_channels import PruneChannels
from graphopt.passes.errors import PlanError
from graphopt.passes.manager import PassManager
from graphopt.passes.plan import Plan
from graphopt.passes.ranges import format_ranges, parse_ranges


@pytest.fixture(scope="module")
def plan() -> Plan:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    manager = PassManager(passes=(PruneChannels(),), context=Context(budget=0.6))
    return manager.run(capture(model, torch.randn(3, 8)))


def test_a_plan_reads_back(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    assert Plan.load(path) == plan
    data = json.loads(plan.to_json())
    assert data["changes"][0]["pass"] == "prune-channels"
    assert data["totals"]["after"]["flops"] < data["totals"]["before"]["flops"]


def edited(plan: Plan, *path: Any, value: Any) -> str:
    data = json.loads(plan.to_json())
    item = data
    for key in path[:-1]:
        item = item[key]
    item[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 2, "has schema version 2, this graphopt reads up to 1"),
        (("schema_version",), "1", "schema_version"),
        (("code",), "import os", "code: Extra inputs are not permitted"),
        (("changes", 0, "pass"), 3, "changes.0.pass"),
        (("changes", 0, "details"), [], "changes.0.details"),
        (("changes", 0, "before", "flops"), -1, "changes.0.before.flops"),
        (("changes",), "none", "changes"),
        (("inputs", 0, "shape"), ["a"], "inputs.0.shape.0"),
    ],
)
def test_damaged_plans_are_refused(
    plan: Plan, path: tuple[Any, ...], value: Any, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(edited(plan, *path, value=value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '{"schema_version": 1, "x": 1}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("indices", [[0], [0, 1, 2], [1, 3, 4, 5, 9], list(range(0, 40, 2))])
def test_ranges_read_back(indices: list[int]) -> None:
    assert parse_ranges(format_ranges(indices), 40) == indices


@pytest.mark.parametrize("text", ["", "3,1", "1-0", "0-40", "40", "1,1", "a", "0-3,2", 5, None])
def test_wrong_ranges_are_refused(text: object) -> None:
    with pytest.raises(PlanError):
        parse_ranges(text, 40)
