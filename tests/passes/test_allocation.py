"""Budgets met, determinism, swaps, interruption and resuming, on tiny models and real passes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn

from graphopt.capture import capture
from graphopt.passes.allocation.allocator import Allocator
from graphopt.passes.allocation.dry_run import DryRun
from graphopt.passes.allocation.frontier import frontier
from graphopt.passes.allocation.journal import Journal
from graphopt.passes.allocation.offers import Offer, collect_offers
from graphopt.passes.allocation.selection import conflict
from graphopt.passes.allocation.solver import Solver
from graphopt.passes.base import Candidate, Context, Pass
from graphopt.passes.budget import Budget, parse_budget, spent
from graphopt.passes.calibration import Calibration
from graphopt.passes.compress.factorize_low_rank import FactorizeLowRank
from graphopt.passes.compress.prune_channels import PruneChannels
from graphopt.passes.compress.quantize_weights import QuantizeWeights
from graphopt.passes.compress.sparsify_blocks import SparsifyBlocks
from graphopt.passes.errors import ConfigError
from graphopt.passes.exact.fold_batch_norm import FoldBatchNorm
from graphopt.passes.guard import Guard
from graphopt.passes.loss_model import LossModel
from graphopt.passes.program import Program
from graphopt.passes.snapshot import twin_of

PASSES = (PruneChannels(round_to=1), FactorizeLowRank(round_to=1), SparsifyBlocks())


class CountedLosses:
    """The loss model, counted, and interrupted once after so many calls."""

    def __init__(self, program: Program, stop_after: int | None = None) -> None:
        self._model = LossModel(program, Context())
        self.calls = 0
        self._stop_after = stop_after

    def estimate(self, step: Pass, candidate: Candidate) -> Candidate:
        self._count()
        return self._model.estimate(step, candidate)

    def measure(self, chosen: Sequence[tuple[Pass, Candidate]]) -> float:
        self._count()
        return self._model.measure(chosen)

    def made(self, chosen: Sequence[tuple[Pass, Candidate]]) -> AbstractContextManager[Program]:
        return self._model.made(chosen)

    def _count(self) -> None:
        if self.calls == self._stop_after:
            self._stop_after = None
            raise KeyboardInterrupt
        self.calls += 1


def captured(name: str) -> Program:
    torch.manual_seed(0)
    case = zoo.find_case(name)
    args, kwargs = case.call(*zoo.EXAMPLE)
    return capture(case.build().eval(), args or kwargs)


def allocator(
    program: Program, losses: CountedLosses | None = None, store: Path | None = None
) -> Allocator:
    losses = losses or CountedLosses(program)
    return Allocator(program, PASSES, Context(), dense=twin_of(program), losses=losses, store=store)


def layers(*widths: int) -> Program:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return capture(nn.Sequential(*modules[:-1]).eval(), torch.randn(32, widths[0]))


def static_at(offer: Offer, name: str) -> bool:
    change = offer.candidate.change
    return change.target == name and change.details.get("activations") == "static"


@pytest.fixture(scope="module")
def perceptron() -> Program:
    return layers(24, 64, 48, 8)


@pytest.fixture(scope="module")
def deep() -> Program:
    return layers(16, 24, 32, 24, 40, 24, 32, 8)


@pytest.mark.parametrize(
    ("name", "budgets"), [("bert", ("50%", "75% parameters")), ("resnet", ("60%", "60% bytes"))]
)
def test_budgets_are_met_within_two_percent(name: str, budgets: tuple[str, ...]) -> None:
    solver = allocator(captured(name))
    for text in budgets:
        budget = parse_budget(text)
        assert budget is not None
        choice = solver.solve(budget)
        assert 0.98 <= spent(choice.cost, budget.resource) / choice.allowed <= 1, text


def test_what_is_chosen_goes_together_and_the_rest_has_reasons(
    perceptron: Program,
) -> None:
    result = allocator(perceptron).allocate(parse_budget("50%"), None)
    candidates = [offer.candidate for offer in result.offers]
    assert len(candidates) > 1
    for number, first in enumerate(candidates):
        assert not any(conflict(first, second) for second in candidates[number + 1 :])
    assert 0 < result.loss < 1
    owners = [(offer.step.name, offer.candidate.change.target) for offer in result.offers]
    refused = [(miss.pass_name, miss.target) for miss in result.misses]
    assert len(refused) == len(set(refused))
    assert not set(owners) & set(refused)


class MisjudgedLosses(CountedLosses):
    """Losses of which one layer's turn out five times as high when they are measured."""

    def measure(self, chosen: Sequence[tuple[Pass, Candidate]]) -> float:
        self._count()
        return sum(
            (candidate.loss or 0.0) * (5 if candidate.change.target.startswith("4") else 1)
            for _, candidate in chosen
        )


def test_swaps_lower_the_measured_loss_within_the_budget(deep: Program) -> None:
    budget = parse_budget("60%")
    assert budget is not None
    solver = allocator(deep, MisjudgedLosses(deep))
    before = solver.solve(budget)
    after = solver.allocate(budget, None)
    assert after.loss < 0.95 * before.loss
    assert 0.98 * before.allowed <= after.cost.flops <= before.allowed


def test_what_swaps_spend_is_checked_by_a_dry_run(
    deep: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swaps that are predicted to spend nothing more lower the loss far above the budget."""
    budget = parse_budget("60%")
    assert budget is not None
    monkeypatch.setattr(Solver, "predicted", lambda _, resource, choice, chosen: choice.allowed)
    solver = allocator(deep, MisjudgedLosses(deep))
    found = solver.allocate(budget, None)
    made = DryRun(deep, PASSES, Context(), found.offers, twin_of(deep)).realize(
        range(len(found.offers))
    )
    assert made.cost == found.cost
    assert 0.98 * budget.allowed(found.dense) <= made.cost.flops <= budget.allowed(found.dense)


def test_dry_runs_leave_out_what_does_not_fit(deep: Program) -> None:
    """Of two ranks of one layer the second is said not to fit, and the rest is made."""
    offers = collect_offers(deep, PASSES, Context())[0]
    ranks = [offer for offer in offers if offer.step.name == "factorize-low-rank"][:2]
    assert ranks[0].candidate.change.target == ranks[1].candidate.change.target
    other = next(o for o in offers if o.candidate.change.target.startswith("8"))
    run = DryRun(deep, PASSES, Context(), [*ranks, other], twin_of(deep))
    made = run.realize([0, 1, 2])
    assert list(made.unfit) == [1]
    assert made.cost == run.realize([0, 2]).cost
    assert made.cost.flops < run.dense.flops


def test_dry_runs_round_nothing(deep: Program) -> None:
    """A layer that was pruned gets integers of its new size, without the data that static needs."""
    steps = (PruneChannels(round_to=1), QuantizeWeights(activations="static"))
    calibration = Calibration([{"input_1": torch.randn(32, 16)}])
    context = Context(calibration=calibration)
    pruned, *_ = collect_offers(deep, steps[:1], context)[0]
    name = pruned.candidate.change.target.removesuffix(".weight")
    (step,) = (offer for offer in collect_offers(deep, steps, context)[0] if static_at(offer, name))
    run = DryRun(deep, steps, context, [pruned, step], twin_of(deep))
    alone, both = run.realize([0]), run.realize([0, 1])
    assert not both.unfit
    assert both.cost.flops == alone.cost.flops
    assert both.cost.size_bytes < alone.cost.size_bytes


def test_the_same_seed_gives_the_same_choice(deep: Program) -> None:
    found = [allocator(deep).allocate(parse_budget("60%"), None) for _ in range(2)]
    assert [o.candidate for o in found[0].offers] == [o.candidate for o in found[1].offers]
    assert found[0].loss == found[1].loss


def test_an_interrupted_run_is_resumed(deep: Program, tmp_path: Path) -> None:
    budget = parse_budget("60%")
    assert budget is not None
    whole = CountedLosses(deep)
    expected = allocator(deep, whole).allocate(budget, None)
    first = CountedLosses(deep, whole.calls - 10)
    stopped = allocator(deep, first, tmp_path).allocate(budget, None)
    assert stopped.cost.flops <= budget.allowed(stopped.dense)
    assert any(note.startswith("interrupted: best of ") for note in stopped.notes)
    assert len(list(tmp_path.iterdir())) == 1
    second = CountedLosses(deep)
    resumed = allocator(deep, second, tmp_path).allocate(budget, None)
    assert second.calls == 10
    assert [o.candidate.change for o in resumed.offers] == [
        o.candidate.change for o in expected.offers
    ]
    assert resumed.loss == expected.loss


def test_an_interruption_while_losses_are_estimated_uses_those_that_are_known(
    perceptron: Program,
) -> None:
    found = allocator(perceptron, CountedLosses(perceptron, 30)).allocate(parse_budget("90%"), None)
    assert found.offers
    assert found.notes[0].startswith("interrupted: 30 of ")


def test_a_budget_that_cannot_be_met_takes_the_strongest_choice(perceptron: Program) -> None:
    choice = allocator(perceptron).solve(Budget(resource="flops", amount=0.001, relative=True))
    assert not choice.met
    dense = allocator(perceptron).dense
    assert choice.cost.flops < 0.2 * dense.flops


def test_nothing_is_changed_where_the_exact_passes_meet_the_budget() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)).eval()
    program = capture(model, torch.randn(4, 8))
    parameters = sum(value.numel() for value in model.parameters())
    found = Allocator(
        program,
        (*PASSES, FoldBatchNorm()),
        Context(),
        dense=twin_of(program),
        losses=CountedLosses(program),
    ).allocate(Budget(resource="parameters", amount=parameters - 16, relative=False), None)
    assert not found.offers
    assert found.cost.parameters == parameters - 16
    assert isinstance(model[1], nn.BatchNorm1d)


def test_a_guard_alone_takes_the_cheapest_choice_that_it_allows(perceptron: Program) -> None:
    solver = allocator(perceptron)
    costs, losses = [], []
    for drift in (0.05, 0.5):
        found = solver.allocate(None, Guard(max_drift=drift))
        costs.append(found.cost.flops)
        losses.append(found.loss)
        assert found.loss <= drift**2
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]
    weak = solver.allocate(parse_budget("30%"), Guard(max_drift=0.05))
    assert weak.cost.flops == costs[0]


def test_what_cannot_be_solved_is_said(perceptron: Program) -> None:
    solver = allocator(perceptron)
    with pytest.raises(ConfigError, match="needs a budget such as '60%' or '12ms', or a guard"):
        solver.allocate(None, None)
    with pytest.raises(ConfigError, match="needs measured times"):
        solver.allocate(parse_budget("1ms"), None)


def test_less_may_be_spent_only_at_a_higher_loss(perceptron: Program) -> None:
    budgets = [parse_budget(text) for text in ("90%", "60%", "30%")]
    points = list(frontier(allocator(perceptron), [b for b in budgets if b is not None]))
    assert all(point.met for point in points)
    assert [p.cost.flops for p in points] == sorted((p.cost.flops for p in points), reverse=True)
    assert points[0].loss < points[-1].loss


def test_a_damaged_journal_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal.json"
    path.write_text('{"schema": 1, "estimates": 3}')
    assert Journal(path).loss([]) is None
    assert "is ignored" in caplog.text
