"""Order, limits, rollback, replay and bisection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import pytest
import torch
from small_pipeline import PRUNE, given_up, program
from torch import nn

from graphopt.capture import capture
from graphopt.passes.base import Candidate, Change, Context, Cost, Pass, Proposal, State
from graphopt.passes.budget import parse_budget
from graphopt.passes.compress.prune_channels import PruneChannels
from graphopt.passes.errors import ConfigError, PlanError, VerificationError
from graphopt.passes.exact.fold_batch_norm import FoldBatchNorm
from graphopt.passes.guard import Guard
from graphopt.passes.manager import PassManager, apply_plan, bisect, load_state
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program


def run(current: Program, *steps: Pass, limit: int | None = None, **context: Any) -> Plan:
    return PassManager(passes=steps, context=Context(**context), limit=limit).run(current)


@final
@dataclass(frozen=True, kw_only=True)
class Spoil(Pass):
    """Claims to be exact and is not."""

    name: ClassVar[str] = "spoil"
    exact: ClassVar[bool] = True

    how: str = "values"

    def propose(self, program: Program, context: Context) -> Proposal:
        cost = Cost(flops=1, size_bytes=1, parameters=1)
        change = Change(pass_name=self.name, target="0", summary=self.how)
        return Proposal(candidates=(Candidate(change=change, before=cost, after=cost),))

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        weight = program.model.get_parameter("0.weight")
        return {"0.weight": weight.detach() * 1.01} if self.how == "values" else {}

    def apply(self, program: Program, change: Change) -> None:
        if self.how == "crash":
            program.model.get_submodule("0").weight = nn.Parameter(torch.zeros(1))
            raise RuntimeError("a bug in a pass")

    def restore(self, model: nn.Module, change: Change) -> None:
        raise PlanError("cannot be undone")


def test_a_limit_accepts_the_first_changes_only() -> None:
    assert [len(run(program(), PRUNE, budget=0.5, limit=n).changes) for n in (0, 1, 9)] == [0, 1, 2]


def test_a_dry_run_plans_what_a_run_does_and_changes_nothing() -> None:
    current = program()
    before = current.code, {n: p.clone() for n, p in current.model.named_parameters()}
    planned = PassManager(passes=(PRUNE,), context=Context(budget=0.5)).propose(current)
    assert current.code == before[0]
    assert all(torch.equal(p, before[1][n]) for n, p in current.model.named_parameters())
    done = run(current, PRUNE, budget=0.5)
    assert planned.totals == done.totals
    assert [c.summary for c in planned.changes] == [c.summary for c in done.changes]


def test_later_passes_do_not_run_when_the_budget_is_met() -> None:
    plan = run(program(), PRUNE, PruneChannels(round_to=2), budget=0.5)
    assert [m.reason for m in plan.misses][-1] == "earlier passes already met the budget"
    plan = run(program(), PRUNE, budget=1.0)
    assert [m.reason for m in plan.misses] == ["the model already meets the budget"]


def test_passes_for_inference_do_not_run_in_training() -> None:
    plan = run(program(), FoldBatchNorm(), training=True)
    assert plan.misses[0].reason == "its result must not be trained, and the recipe trains"


def test_a_broken_promise_is_rolled_back_and_names_the_pass() -> None:
    current = program()
    weight = current.model.get_parameter("0.weight")
    with pytest.raises(VerificationError, match="spoil promises unchanged outputs") as caught:
        run(current, Spoil())
    assert current.model.get_parameter("0.weight") is weight
    path = Path(str(caught.value).rpartition("the plan is in ")[2])
    assert [c.pass_name for c in Plan.load(path / "plan.json").changes] == ["spoil"]


def test_changes_of_earlier_passes_survive_a_roll_back() -> None:
    current = program()
    with pytest.raises(VerificationError):
        run(current, PRUNE, Spoil(), budget=0.5)
    assert current.model.get_parameter("0.weight").shape[0] < 16
    assert current(torch.randn(3, 8)).shape == (3, 4)


def test_a_crash_leaves_the_model_as_it_was() -> None:
    current = program()
    weight = current.model.get_parameter("0.weight")
    with pytest.raises(RuntimeError, match="a bug in a pass"):
        run(current, Spoil(how="crash"))
    assert current.model.get_parameter("0.weight") is weight


def test_rolling_back_restores_sizes_inside_leaf_modules() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.last(self.depthwise(self.first(x)))
            return result

    current = capture(Grouped(), torch.randn(2, 3, 6, 6))

    def bodies() -> list[str]:
        return [str(n.meta["body"]) for n in current.graph.nodes if "body" in n.meta]

    before = bodies()
    with pytest.raises(RuntimeError):
        PassManager(passes=(PruneThenCrash(),), context=Context(budget=0.5), verify=False).run(
            current
        )
    assert bodies() == before
    assert current.model.get_submodule("depthwise").groups == 8


@final
@dataclass(frozen=True, kw_only=True)
class PruneThenCrash(Pass):
    """Prunes, then fails."""

    name: ClassVar[str] = "prune-then-crash"
    exact: ClassVar[bool] = False

    def propose(self, program: Program, context: Context) -> Proposal:
        return PRUNE.propose(program, context)

    def settle(self, program: Program, candidate: Candidate, context: Context) -> Candidate:
        return PRUNE.settle(program, candidate, context)

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        return {}

    def apply(self, program: Program, change: Change) -> None:
        PRUNE.apply(program, change)
        raise RuntimeError("a bug in a pass")

    def restore(self, model: nn.Module, change: Change) -> None:
        raise PlanError("cannot be undone")


def test_a_plan_replays_on_a_fresh_model() -> None:
    current = program()
    plan = Plan.from_json(run(current, PRUNE, budget=0.5).to_json())
    fresh = program()
    apply_plan(fresh, plan)
    load_state(fresh, current.model.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), current(x))
    fewer = program()
    apply_plan(fewer, plan, limit=1)
    assert fewer.model.get_parameter("4.weight").shape == (4, 12)


def test_plans_for_other_models_are_refused() -> None:
    plan = run(program(), PRUNE, budget=0.5)
    other = capture(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)), torch.randn(5, 8))
    with pytest.raises(PlanError):
        apply_plan(other, plan)
    unknown = replace(plan.changes[0].change, pass_name="prune-chanels")
    record = plan.changes[0].model_copy(update={"pass_name": unknown.pass_name})
    with pytest.raises(ConfigError, match="did you mean 'prune-channels'"):
        apply_plan(program(), plan.model_copy(update={"changes": (record,)}))


@pytest.mark.parametrize("guilty", range(1, 8))
def test_bisection_finds_the_guilty_change(guilty: int) -> None:
    asked: list[int] = []

    def is_good(count: int) -> bool:
        asked.append(count)
        return count < guilty

    assert bisect(is_good, 7) == guilty
    assert len(asked) <= 4
    assert bisect(lambda count: True, 7) is None


def test_a_guard_too_tight_for_anything_leaves_the_model_unchanged() -> None:
    current = program()
    x = torch.randn(3, 8)
    before = current.code, current(x)
    guard = Guard(max_drift=1e-7)
    plan = PassManager(passes=(PRUNE,), context=Context(budget=0.5), guard=guard).run(current)
    assert current.code == before[0]
    assert torch.equal(current(x), before[1])
    assert not plan.changes
    assert "no change satisfies the guard (max_drift=1e-07): the model is unchanged" in plan.notes
    assert [m.target for m in given_up(plan)] == ["0.weight", "2.weight"]


def test_a_change_that_breaks_a_score_is_named_and_rolled_back() -> None:
    def keeps_the_first_layer(current: Program) -> float:
        return float(current.model.get_parameter("0.weight").shape[0] == 16)

    current = program()
    guard = Guard(score=keeps_the_first_layer)
    plan = PassManager(passes=(PRUNE,), context=Context(budget=0.5), guard=guard).run(current)
    assert [c.target for c in plan.changes] == ["2.weight"]
    (miss,) = given_up(plan)
    assert miss.target == "0.weight"
    assert miss.reason.startswith("given up: the score keeps_the_first_layer went from 1 to 0")
    assert current.model.get_parameter("0.weight").shape == (16, 8)
    assert current.model.get_parameter("2.weight").shape[0] < 12


def test_an_exact_pass_that_breaks_a_score_is_taken_back_as_a_whole() -> None:
    def keeps_modules(current: Program) -> float:
        return float(any(isinstance(m, nn.BatchNorm1d) for m in current.model.modules()))

    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()
    current = capture(model, torch.randn(5, 8))
    x = torch.randn(3, 8)
    before = current(x)
    guard = Guard(score=keeps_modules)
    plan = PassManager(passes=(FoldBatchNorm(), PRUNE), context=Context(budget=0.5), guard=guard)
    made = plan.run(current)
    assert {c.pass_name for c in made.changes} == {"prune-channels"}
    assert [m.pass_name for m in given_up(made)] == ["fold-batch-norm"]
    assert current(x).shape == before.shape


def test_uniform_budgets_are_shares_of_the_flops() -> None:
    half = run(program(), PRUNE, budget=0.5)
    manager = PassManager(passes=(PRUNE,), context=Context(), budget=parse_budget("50%"))
    assert manager.run(program()).changes == half.changes
    manager = PassManager(passes=(PRUNE,), context=Context(), budget=parse_budget("1kb"))
    with pytest.raises(ConfigError, match="needs allocation='solver'"):
        manager.run(program())


def test_unknown_allocations_are_refused() -> None:
    manager = PassManager(passes=(PRUNE,), context=Context(), allocation="fair")
    with pytest.raises(ConfigError, match="'uniform' or 'solver', got 'fair'"):
        manager.run(program())
