"""What accuracy costs: points from many budgets, their files, and what cannot be drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.errors import CheckpointError, ConfigError, MissingExtraError
from graphopt.frontier import Frontier, frontier
from graphopt.job import Job
from graphopt.passes.allocation.frontier import Point
from graphopt.recipes import load_recipe


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    ).eval()


def batches() -> list[torch.Tensor]:
    return [torch.randn(32, 16) for _ in range(4)]


@pytest.fixture(scope="module")
def found() -> Frontier:
    torch.manual_seed(1)
    return frontier(
        network(),
        torch.randn(32, 16),
        recipe="deploy",
        budgets=["80%", "50%", "20%"],
        calibration=batches(),
        measure=False,
    )


def test_less_costs_more_accuracy(found: Frontier) -> None:
    assert [point.budget for point in found.points] == ["80% flops", "50% flops", "20% flops"]
    flops = [found.dense.flops, *(point.cost.flops for point in found.points)]
    assert flops == sorted(flops, reverse=True)
    for point, share in zip(found.points, (0.8, 0.5, 0.2), strict=True):
        assert point.met
        assert point.changes
        assert point.cost.flops <= share * found.dense.flops
    errors = [point.relative_error for point in found.points]
    assert 0 < errors[0] < errors[1] < errors[2] < 1


def test_the_model_stays_as_it_is() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frontier(model, torch.randn(8, 16), recipe="prune-channels", budgets=["50%"], measure=False)
    assert type(model) is nn.Sequential
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_budgets_they_go_from_90_to_30_percent() -> None:
    result = frontier(network(), torch.randn(8, 16), recipe="prune-channels", measure=False)
    assert not result.is_timed
    assert [point.budget for point in result.points] == [
        f"{share}% flops" for share in (90, 80, 70, 60, 50, 40, 30)
    ]


def test_points_of_time_are_timed() -> None:
    result = frontier(
        network(), torch.randn(64, 16), recipe="prune-channels", budgets=["70% latency"]
    )
    assert result.is_timed
    assert result.to_json()["points"][0]["cost"]["latency_ms"] == result.points[0].cost.latency_ms


def test_files_hold_what_is_printed(found: Frontier, tmp_path: Path) -> None:
    found.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "frontier.json",
        "frontier.png",
    ]
    data = json.loads((tmp_path / "out" / "frontier.json").read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(found.to_json()))
    assert data["points"][0]["cost"]["flops"] == found.points[0].cost.flops
    picture = (tmp_path / "out" / "frontier.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    found.save(tmp_path / "out")
    text = str(found)
    for point in found.points:
        assert point.budget in text
        assert f"{point.relative_error:.2g}" in text


def test_other_files_are_not_written_over(found: Frontier, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError):
        found.save(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_drawing_without_matplotlib_names_the_extra(
    found: Frontier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'graphopt\[plot\]'"):
        found.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interruption_keeps_the_points_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Job.frontier

    def interrupted(self: Job, *arguments: Any) -> Iterator[Point]:
        points = whole(self, *arguments)
        yield next(points)
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "frontier", interrupted)
    settings: dict[str, Any] = {"recipe": "prune-channels", "measure": False}
    result = frontier(network(), torch.randn(8, 16), budgets=["80%", "50%"], **settings)
    assert len(result.points) == 1
    assert result.notes == ("interrupted: 1 of 2 budgets are solved",)


def test_exact_recipes_have_no_frontier() -> None:
    with pytest.raises(ConfigError, match="needs a pass that trades accuracy for cost"):
        frontier(network(), torch.randn(8, 16), recipe="exact", measure=False)


def test_a_guard_of_the_recipe_plays_no_part(found: Frontier) -> None:
    limit = load_recipe("deploy").max_drift
    assert limit is not None
    assert found.points[-1].relative_error > limit


def test_no_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one budget"):
        frontier(network(), torch.randn(8, 16), budgets=[])
