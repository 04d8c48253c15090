"""Pipelines whose changes the solver chooses: budgets, guards, and what is given up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import pytest
import torch
from small_pipeline import PRUNE, given_up, program
from torch import nn

from graphopt.capture import capture
from graphopt.passes.allocation.allocator import Allocator
from graphopt.passes.base import Candidate, Change, Context, Cost, Pass, Proposal, State
from graphopt.passes.budget import parse_budget
from graphopt.passes.calibration import Calibration
from graphopt.passes.compress.factorize_low_rank import FactorizeLowRank
from graphopt.passes.errors import PlanError
from graphopt.passes.exact.fold_batch_norm import FoldBatchNorm
from graphopt.passes.guard import Guard
from graphopt.passes.manager import PassManager
from graphopt.passes.program import Program
from graphopt.passes.snapshot import twin_of
from graphopt.passes.verifier import relative_error


def solved(current: Program, budget: str | None, *steps: Pass, **options: Any) -> PassManager:
    return PassManager(
        passes=steps or (PRUNE, FactorizeLowRank(round_to=1)),
        context=Context(**{"calibration": calibration(current), **options.pop("context", {})}),
        budget=parse_budget(budget),
        allocation="solver",
        **options,
    )


def calibration(current: Program) -> Calibration:
    torch.manual_seed(1)
    (name,) = current.example
    return Calibration([{name: torch.randn(64, 8)} for _ in range(3)])


@pytest.mark.parametrize(
    ("budget", "resource"),
    [("60%", "flops"), ("60% parameters", "parameters"), ("60% bytes", "size_bytes")],
)
def test_the_solver_meets_budgets_of_every_resource(budget: str, resource: str) -> None:
    current = program()
    plan = solved(current, budget).run(current)
    assert plan.totals is not None
    share = getattr(plan.totals.after, resource) / getattr(plan.totals.before, resource)
    assert 0.5 < share <= 0.6
    assert not any("is not met" in note for note in plan.notes)
    assert all(record.loss is not None for record in plan.changes)
    assert {record.loss_source for record in plan.changes} <= {"data", "measured"}
    decided = {(record.pass_name, record.target) for record in plan.changes}
    refused = [(miss.pass_name, miss.target) for miss in plan.misses]
    assert len(refused) == len(set(refused))
    assert not decided & set(refused)


def test_a_dry_run_of_the_solver_plans_what_a_run_does() -> None:
    current = program()
    weight = current.model.get_parameter("0.weight")
    steps = (PRUNE, FactorizeLowRank(round_to=1), FoldBatchNorm())
    planned = solved(current, "60%", *steps).propose(current)
    assert current.model.get_parameter("0.weight") is weight
    assert weight.shape == (16, 8)
    done = solved(current, "60%", *steps).run(current)
    assert [(c.target, c.summary) for c in planned.changes] == [
        (c.target, c.summary) for c in done.changes
    ]
    assert planned.totals == done.totals


def test_meta_weights_can_be_solved_for() -> None:
    current = program()
    twin = twin_of(current)
    twin.model.to("meta")
    options: dict[str, Any] = {"context": {"calibration": None}}
    plan = solved(twin, "60%", **options).propose(twin)
    assert plan.totals is not None
    assert 0.58 <= plan.totals.after.flops / plan.totals.before.flops <= 0.6
    assert plan.changes


def test_a_budget_out_of_reach_is_noted_with_what_was_reached() -> None:
    current = program()
    plan = solved(current, "100 parameters", FactorizeLowRank(round_to=4)).run(current)
    assert plan.totals is not None
    left = plan.totals.after.parameters
    assert left > 100
    assert any(
        note.startswith(f"the budget of 100 parameters is not met: {left} parameters is left")
        for note in plan.notes
    )


def test_a_guard_makes_the_solvers_choice_weaker_than_its_budget() -> None:
    current = program()
    x = torch.randn(40, 8)
    before = current(x)
    guard = Guard(max_drift=0.1)
    plan = solved(current, "30%", guard=guard).run(current)
    assert plan.totals is not None
    assert plan.guard is not None
    assert plan.guard.drift <= 0.1
    assert 0.3 * plan.totals.before.flops < plan.totals.after.flops
    assert any("is not met" in note for note in plan.notes)
    assert relative_error(current(x), before) < 0.3


def test_a_guard_without_a_budget_changes_what_it_allows() -> None:
    found = []
    for drift in (0.05, 0.4):
        current = program()
        plan = solved(current, None, guard=Guard(max_drift=drift)).run(current)
        assert plan.totals is not None
        assert plan.guard is not None
        assert plan.guard.drift <= drift
        found.append(plan.totals.after.flops)
    assert found[1] < found[0]


class Residual(nn.Module):
    """One block of a deep model."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + inner


def test_what_a_guard_will_allow_is_asked_of_its_own_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused: list[Candidate] = []
    monkeypatch.setattr(Allocator, "milder", lambda _, candidate: refused.append(candidate))
    current = program()
    (name,) = current.example
    torch.manual_seed(1)
    # Calibration data that hide what half of the inputs do: losses on them say too little.
    silent = torch.randn(64, 8).index_fill(1, torch.arange(4, 8), 0.0)
    plan = solved(
        current,
        None,
        context={"calibration": Calibration([{name: silent}])},
        guard=Guard(max_drift=0.2),
        guard_batches=[{name: torch.randn(64, 8)}],
    ).run(current)
    assert plan.changes
    assert not refused


def test_a_score_alone_is_spent_on_all_layers_not_on_the_first() -> None:
    torch.manual_seed(0)
    current = capture(nn.Sequential(*(Residual() for _ in range(5))).eval(), torch.randn(5, 8))
    x = torch.randn(64, 8)
    before = current(x)

    def closeness(changed: Program) -> float:
        return -relative_error(changed(x), before)

    guard = Guard(score=closeness, max_drop=0.1)
    plan = solved(current, None, PRUNE, guard=guard).run(current)
    assert plan.totals is not None
    assert plan.guard is not None
    assert plan.guard.score_after is not None
    assert plan.guard.score_after >= -0.1
    assert len(plan.changes) == 5
    # Where every layer is taken as far as it goes and then back, two are given up, and 71 % remain.
    assert plan.totals.after.flops <= 0.65 * plan.totals.before.flops


def test_a_weaker_level_of_what_the_guard_refuses_is_made() -> None:
    def keeps_half(current: Program) -> float:
        return float(current.model.get_parameter("0.weight").shape[0] >= 8)

    units = []
    for guard in (None, Guard(score=keeps_half)):
        current = program()
        plan = solved(current, "30%", PRUNE, guard=guard).run(current)
        units.append(current.model.get_parameter("0.weight").shape[0])
    assert units[0] < 8 <= units[1] < 16
    assert "0.weight" in [record.target for record in plan.changes]


def test_a_choice_that_no_longer_fits_becomes_a_miss() -> None:
    current = program()
    plan = solved(current, "60%", PRUNE, Forgetful()).run(current)
    reasons = [miss.reason for miss in plan.misses if miss.pass_name == "forgetful"]
    assert reasons == ["it does not fit any more"]
    assert plan.changes


@final
@dataclass(frozen=True, kw_only=True)
class Forgetful(Pass):
    """Offers to remove everything for nothing, and cannot make it."""

    name: ClassVar[str] = "forgetful"
    exact: ClassVar[bool] = False

    def propose(self, program: Program, context: Context) -> Proposal:
        before = Cost(flops=100, size_bytes=100, parameters=25)
        after = Cost(flops=0, size_bytes=0, parameters=0)
        change = Change(pass_name=self.name, target="4", summary="nothing")
        return Proposal(candidates=(Candidate(change=change, before=before, after=after),))

    def reconstruct(self, program: Program, change: Change, state: State) -> State | None:
        return {"4.weight": program.model.get_parameter("4.weight").detach()}

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        return {}

    def apply(self, program: Program, change: Change) -> None:
        raise PlanError("it does not fit any more")

    def restore(self, model: nn.Module, change: Change) -> None:
        raise PlanError("cannot be undone")


def test_a_guard_too_tight_for_any_choice_of_the_solver_says_what_was_given_up() -> None:
    current = program()
    x = torch.randn(3, 8)
    before = current(x)
    plan = solved(current, "60%", guard=Guard(max_drift=1e-5)).run(current)
    assert torch.equal(current(x), before)
    assert not plan.changes
    assert "no change satisfies the guard (max_drift=1e-05): the model is unchanged" in plan.notes
    assert given_up(plan)
