"""The guard end to end: what `optimize` returns keeps to it, and what it gave up has a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import Case, find_case

import graphopt
from graphopt.errors import ConfigError
from graphopt.runtime import installation_of

LENGTH = 12


def batches(case: Case) -> list[dict[str, Any]]:
    """Return calibration batches of different sizes; the last one is held out."""
    found = []
    for rows in (8, 6, 7, 5):
        inputs = case.inputs(rows, LENGTH)
        assert isinstance(inputs, dict)
        found.append(inputs)
    return found


def built(case: Case) -> nn.Module:
    """Return a model with weights that are not all alike, in evaluation mode."""
    torch.manual_seed(0)
    return case.build().eval()


def main_output(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        outputs: Any = model(**batch)
    result: Tensor = outputs[0]
    return result.double()


def drift(optimized: nn.Module, dense: nn.Module, batch: dict[str, Any]) -> float:
    """Return the relative error of the first output."""
    expected = main_output(dense, batch)
    error: Tensor = (main_output(optimized, batch) - expected).norm() / expected.norm()
    return error.item()


def plan_of(model: nn.Module) -> graphopt.Plan:
    installation = installation_of(model)
    assert installation is not None
    return installation.plan


@pytest.mark.parametrize(
    ("name", "allocation"),
    [
        ("bert-classifier", "uniform"),
        ("gpt2", "uniform"),
        ("vit", "uniform"),
        ("resnet", "solver"),
    ],
)
def test_deploy_keeps_to_its_guard_on_held_out_batches(name: str, allocation: str) -> None:
    case = find_case(name)
    dense, data = built(case), batches(case)
    optimized = graphopt.optimize(
        dense,
        data[0],
        recipe="deploy",
        allocation=allocation,
        calibration=data,
        max_drift=0.08,
        measure=False,
    )
    guard = plan_of(optimized).guard
    assert guard is not None
    assert guard.batches == 1
    assert drift(optimized, dense, data[-1]) <= 0.08
    assert drift(optimized, dense, data[-1]) <= guard.drift * (1 + 1e-5) <= 0.08
    assert plan_of(optimized).changes


@pytest.mark.parametrize(
    ("name", "allocation"), [("gpt2", "uniform"), ("vit", "solver"), ("resnet", "uniform")]
)
def test_a_guard_too_tight_for_anything_gives_the_model_back(
    name: str, allocation: str, tmp_path: Path
) -> None:
    case = find_case(name)
    dense, data = built(case), batches(case)
    optimized = graphopt.optimize(
        dense,
        data[0],
        recipe="deploy",
        allocation=allocation,
        calibration=data,
        max_drift=1e-9,
        measure=False,
    )
    assert torch.equal(main_output(optimized, data[1]), main_output(dense, data[1]))
    assert optimized.state_dict().keys() == dense.state_dict().keys()
    found = graphopt.report(optimized)
    assert not found.kept
    assert found.given_up
    assert found.flops_share == 1.0
    assert "no change satisfies the guard (max_drift=1e-09): the model is unchanged" in str(found)
    graphopt.save(optimized, tmp_path / "out")
    again = graphopt.load(tmp_path / "out")
    assert torch.equal(main_output(again, data[1]), main_output(dense, data[1]))
    assert graphopt.report(again).to_json()["guard"]["drift"] == 0.0


def test_without_calibration_the_guard_looks_at_the_example_and_says_so() -> None:
    case = find_case("vit")
    dense, data = built(case), batches(case)
    optimized = graphopt.optimize(
        dense, data[0], recipe="deploy", allocation="uniform", measure=False
    )
    assert drift(optimized, dense, data[0]) <= 0.1
    note = "the guard was checked on the example inputs: there is no calibration data"
    assert note in plan_of(optimized).notes


def test_the_guard_holds_in_a_saved_model(tmp_path: Path) -> None:
    case = find_case("bert-classifier")
    dense, data = built(case), batches(case)
    optimized = graphopt.optimize(
        dense,
        data[0],
        recipe=["prune-channels", "fuse-projections"],
        calibration=data,
        min_cosine=0.999,
        measure=False,
    )
    graphopt.save(optimized, tmp_path / "out")
    again = graphopt.load(tmp_path / "out")
    expected = main_output(dense, data[-1])
    cosine = torch.cosine_similarity(main_output(again, data[-1]), expected, dim=-1)
    assert cosine.mean() >= 0.999
    assert plan_of(again).guard == plan_of(optimized).guard
    assert graphopt.report(again).flops_share < 1  # type: ignore[operator]


def test_a_change_that_breaks_a_score_is_named_and_rolled_back() -> None:
    case = find_case("bert-classifier")
    dense, data = built(case), batches(case)

    def first_intermediate_is_whole(model: Any) -> float:
        assert not model.training
        return float(model.bert.encoder.layer[0].intermediate.dense.weight.shape[0])

    options: dict[str, Any] = {
        "recipe": ["prune-channels"],
        "budget": 0.6,
        "calibration": data,
        "measure": False,
    }
    free = graphopt.optimize(dense, data[0], **options)
    broken = "bert.encoder.layer.0.intermediate.dense.weight"
    assert broken in [row.target for row in graphopt.report(free).kept]
    guarded = graphopt.optimize(
        dense, data[0], score=first_intermediate_is_whole, max_drop=0, **options
    )
    found = graphopt.report(guarded)
    assert broken not in [row.target for row in found.kept]
    assert found.kept
    (given_up,) = found.given_up
    assert given_up.target == broken
    assert "the score first_intermediate_is_whole went from 64 to" in given_up.reason
    assert first_intermediate_is_whole(guarded) == 64


def test_a_score_calls_the_model_as_its_user_does() -> None:
    case = find_case("gpt2")
    dense, data = built(case), batches(case)
    prompt = data[0]["input_ids"][:1, :4]
    expected = dense.generate(prompt, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    seen: list[nn.Module] = []

    kind = type(dense)

    def same_words(model: Any) -> float:
        assert issubclass(type(model), kind)
        seen.append(model)
        assert model.config.vocab_size == 100
        words = model.generate(prompt, max_new_tokens=3, do_sample=False)
        return float((words == expected).double().mean())

    optimized = graphopt.optimize(
        dense,
        data[0],
        recipe=["prune-channels", "fuse-projections"],
        budget=0.7,
        calibration=data,
        score=same_words,
        max_drop=0.2,
        measure=False,
    )
    assert len(seen) >= 3
    guard = plan_of(optimized).guard
    assert guard is not None
    assert guard.score_before == 1.0
    assert same_words(optimized) == guard.score_after
    assert guard.score_after is not None
    assert guard.score_after >= 0.8


class Branching(nn.Module):
    """Takes one of two ways by the data, so that only its parts can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.second = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        if y.sum().item() <= 1e9:
            y = y + self.second(y)
        return y


def test_parts_are_judged_by_the_model_around_them() -> None:
    dense = Branching().eval()
    data = [torch.randn(32, 16) for _ in range(4)]
    options: dict[str, Any] = {
        "recipe": ["prune-channels"],
        "budget": 0.6,
        "calibration": data,
        "measure": False,
    }
    free = graphopt.optimize(dense, data[0], **options)
    drifts = []
    for optimized in (free, graphopt.optimize(dense, data[0], max_drift=0.05, **options)):
        with torch.no_grad():
            after, before = optimized(data[-1]), dense(data[-1])
        drifts.append(((after - before).norm() / before.norm()).item())
    assert drifts[1] <= 0.05 < drifts[0]
    guard = plan_of(optimized).guard
    assert guard is not None
    assert guard.drift == pytest.approx(drifts[1], rel=1e-5)
    assert graphopt.report(optimized).given_up


def test_an_amount_for_the_whole_model_is_not_given_to_each_part() -> None:
    with pytest.raises(ConfigError, match="a budget of 1000 flops is for the whole model"):
        graphopt.optimize(
            Branching(), torch.randn(4, 16), recipe=["prune-channels"], budget="1e3 flops"
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_drop": 0.1}, "max_drop says how far a score may fall; pass score="),
        ({"score": 0.9}, "score must be a function that takes the model .* got float"),
        ({"score": len, "max_drop": -1}, "max_drop must be at least 0, got -1"),
        ({"max_drift": -0.1}, "max_drift must be"),
        ({"min_cosine": 2}, "min_cosine must be"),
        ({"allocation": "best"}, "allocation must be 'uniform' or 'solver', got 'best'"),
    ],
)
@pytest.mark.parametrize("function", [graphopt.optimize, graphopt.plan])
def test_what_makes_no_sense_is_refused(function: Any, options: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        function(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), recipe="deploy", **options)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="the score <lambda> returned NoneType, not a number"):
        graphopt.optimize(
            nn.Sequential(nn.Linear(4, 4)),
            torch.randn(2, 4),
            recipe="deploy",
            score=lambda model: None,
        )


def test_a_plan_says_that_the_guard_is_not_checked() -> None:
    model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(4, 8)
    found = graphopt.plan(model, x, recipe=["prune-channels"], budget=0.6, max_drift=1e-3)
    note = "a plan is not checked against the guard; optimize may give changes up"
    assert note in found.notes
    assert found.guard is None
