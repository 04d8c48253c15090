"""Low-rank factors: fewer operations, predicted errors that come true, refusals, replay."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from slower_costs import SlowerCosts
from torch import Tensor, nn
from zoo import EXAMPLE, find_case

from graphopt.capture import capture
from graphopt.kernels import LowRankLinear
from graphopt.passes.base import Context
from graphopt.passes.calibration import Calibration
from graphopt.passes.compress.factorize_low_rank import FactorizeLowRank
from graphopt.passes.costs import Costs
from graphopt.passes.errors import PlanError, PreconditionError
from graphopt.passes.facts import total_cost
from graphopt.passes.manager import PassManager, apply_plan
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.propagation import refresh
from graphopt.passes.verifier import observe, relative_error, rounding_bound

FACTORIZE = FactorizeLowRank(round_to=1)


def network(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(24, 16, bias=bias), nn.Tanh(), nn.Linear(16, 20, bias=bias), nn.Tanh(),
        nn.Linear(20, 3),
    )  # fmt: skip


def inputs(rows: int = 64) -> Tensor:
    """Return inputs with a mean and few strong directions, as activations have."""
    directions = torch.randn(24, 24) * torch.logspace(0, -3, 24)
    return torch.randn(rows, 24) @ directions + 1


def factorized(
    model: nn.Module, example: Any, context: Context, step: FactorizeLowRank = FACTORIZE
) -> tuple[Program, Plan]:
    program = capture(model, example)
    return program, PassManager(passes=(step,), context=context).run(program)


def test_a_layer_becomes_two_products_of_its_best_rank() -> None:
    model = network().double()
    dense = copy.deepcopy(model)
    x = inputs().double()
    step = FactorizeLowRank(share=0.6, round_to=1)
    program, plan = factorized(model, x, Context(training=True, ignore=("2",)), step)
    assert [record.summary for record in plan.changes] == ["24 -> 16 at rank 5"]
    layer, original = model[0], dense[0]
    assert isinstance(layer, LowRankLinear)
    assert isinstance(original, nn.Linear)
    values = torch.linalg.svdvals(original.weight)
    error = (layer.weight - original.weight).norm()
    torch.testing.assert_close(error, values[layer.rank :].norm())
    reference = copy.deepcopy(dense)
    with torch.no_grad():
        reference.get_parameter("0.weight").copy_(layer.weight)
    for value in (x, x[:5]):
        assert relative_error(program(value), reference(value)) <= rounding_bound(program)
        assert relative_error(model(value), reference(value)) <= rounding_bound(program)


@pytest.mark.parametrize("bias", [True, False])
def test_calibrated_factors_err_as_predicted_and_less_than_plain_ones(bias: bool) -> None:
    x = inputs()
    errors = []
    for calibration in (None, Calibration([{"input": x[:40]}, {"input": x[40:]}])):
        model = network(bias).eval()
        torch.manual_seed(1)
        nn.init.normal_(model.get_parameter("0.weight"))
        dense = copy.deepcopy(model)
        _, plan = factorized(model, x, Context(calibration=calibration, budget=0.6))
        record = plan.changes[0]
        assert record.target == "0"
        expected, actual = dense[0](x), model[0](x)
        scale = expected - expected.mean(0) if bias else expected
        errors.append(((actual - expected).norm() / scale.norm()).item())
        assert (model[0].bias is None) is not bias
    assert record.predicted_error == pytest.approx(errors[1], rel=1e-3)
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.45])
def test_the_budget_is_met_by_the_whole_program(budget: float) -> None:
    program = capture(network(), inputs())
    before = total_cost(program).flops
    proposal = FACTORIZE.propose(program, Context(budget=budget))
    saved = sum(c.before.flops - c.after.flops for c in proposal.candidates)
    plan = PassManager(passes=(FACTORIZE,), context=Context(budget=budget)).run(program)
    assert total_cost(program).flops <= budget * before
    assert total_cost(program).flops == before - saved
    assert plan.totals is not None
    # One rank more in each layer would already be too much.
    step = sum(c.after.flops / c.change.details["rank"] for c in proposal.candidates)
    assert total_cost(program).flops + step > budget * before


def test_costs_are_those_of_the_result() -> None:
    program = capture(network(), inputs())
    (candidate, *_) = FACTORIZE.propose(program, Context(budget=0.6)).candidates
    _, plan = factorized(network(), inputs(), Context(budget=0.6))
    total = total_cost(capture(network(), inputs()))
    assert plan.totals is not None
    removed = sum(r.before.parameters - r.after.parameters for r in plan.changes)
    assert plan.totals.after.parameters == total.parameters - removed
    assert candidate.after.parameters == 24 * candidate.change.details["rank"] + 16 * (
        candidate.change.details["rank"] + 1
    )


def test_every_parameter_is_trained() -> None:
    model = network()
    program, _ = factorized(model, inputs(), Context(training=True, budget=0.6))
    for training in (True, False):
        found = observe(program, training=training, gradients=True)
        assert set(found.gradients) == {name for name, _ in model.named_parameters()}
    frozen = network().requires_grad_(False)
    factorized(frozen, inputs(), Context(budget=0.6))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_undoing_gives_a_dense_layer_of_the_same_function() -> None:
    model = network()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    x = inputs()
    _, plan = factorized(model, x, Context(budget=0.6))
    with torch.no_grad():
        expected = model(x)
    for record in plan.changes:
        FACTORIZE.restore(model, record.change)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    # The product of the factors is rounded once; sums have at most 24 terms.
    assert relative_error(model(x), expected) <= 24 * torch.finfo(x.dtype).eps


def test_a_real_architecture_is_replayed_on_meta_parameters() -> None:
    case = find_case("llama")
    model = case.build()
    program, plan = factorized(model, case.inputs(*EXAMPLE), Context(training=True, budget=0.7))
    assert len(plan.changes) == 14
    with torch.device("meta"):
        blank = case.build()
    example = {key: value.to("meta") for key, value in dict(case.inputs(3, 6)).items()}
    replayed = capture(blank, example)
    apply_plan(replayed, plan)
    refresh(replayed)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in blank.state_dict().items()} == shapes
    assert FACTORIZE.propose(program, Context()).candidates == ()


class Shared(nn.Module):
    """A layer used twice, a hooked one, a tied head and a narrow layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.twice = nn.Linear(12, 12)
        self.hooked = nn.Linear(12, 12)
        self.narrow = nn.Linear(12, 1)
        self.tied = nn.Linear(12, 30, bias=False)
        self.tied.weight = self.embedding.weight
        self.back = nn.Linear(30, 12)
        self.head = nn.Linear(12, 5)
        self.hooked.register_forward_hook(lambda module, args, output: None)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(self.embedding(tokens))))
        x = self.hooked(x) * self.narrow(x)
        result: Tensor = torch.sigmoid(self.head(self.back(self.tied(x)) + x)).float()
        return result


def test_what_stays_dense_has_a_reason() -> None:
    model = Shared()
    program = capture(model, torch.randint(30, (2, 6)))
    proposal = FACTORIZE.propose(program, Context(ignore=("back",)))
    assert {miss.target: miss.reason for miss in proposal.misses} == {
        "hooked": "hooked has hooks, which expect the module as it is",
        "narrow": "rank 1 needs no fewer operations than 12 -> 1 has",
        "tied": "tied.weight is tied to embedding.weight",
        "back": "ignored by the pattern 'back'",
        "head": "its output is a result of the model, and output heads stay dense",
    }
    assert [candidate.change.target for candidate in proposal.candidates] == ["twice"]


def test_a_layer_that_is_called_twice_is_counted_and_replaced_twice() -> None:
    model = Shared().eval()
    tokens = torch.randint(30, (2, 6))
    program = capture(model, tokens)
    before = total_cost(program).flops
    calibration = Calibration([{"tokens": tokens}])
    plan = PassManager(passes=(FACTORIZE,), context=Context(calibration=calibration)).run(program)
    (record,) = (record for record in plan.changes if record.target == "twice")
    assert record.before.flops == 2 * 2 * 12 * 12 * 12
    saved = sum(r.before.flops - r.after.flops for r in plan.changes)
    assert total_cost(program).flops == before - saved
    assert relative_error(program(tokens), model(tokens)) <= rounding_bound(program)


def test_a_kept_share_per_layer_overrides_the_budget() -> None:
    program = capture(network(), inputs())
    proposal = FACTORIZE.propose(program, Context(budget=0.6, keep={"0": 1.0, "2": 0.3}))
    (candidate,) = proposal.candidates
    assert candidate.change.target == "2"
    assert candidate.change.details["rank"] == int(0.3 * 16 * 20 / 36)
    assert ("0", "all of it fits the budget") in {(m.target, m.reason) for m in proposal.misses}


def test_ranks_are_rounded_down() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    program = capture(model, torch.randn(2, 64))
    step = FactorizeLowRank(share=0.9, round_to=8)
    (candidate,) = step.propose(program, Context()).candidates
    assert candidate.change.details["rank"] == 24


def test_a_measured_loss_is_refused_with_the_number() -> None:
    program = capture(network().eval(), inputs(2))
    proposal = FACTORIZE.propose(program, Context(budget=0.9, costs=SlowerCosts(budget_s=0.01)))
    assert proposal.candidates == ()
    (miss, *_) = (miss for miss in proposal.misses if miss.target == "0")
    assert "measured 0." in miss.reason
    assert miss.reason.endswith("x, kept dense")


def test_a_measured_gain_is_kept_with_both_times() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2)).eval()
    program = capture(model, torch.randn(256, 512))
    step = FactorizeLowRank(share=0.1)
    (candidate,) = step.propose(program, Context(costs=Costs(budget_s=0.05))).candidates
    assert candidate.before.latency_ms is not None
    assert candidate.after.latency_ms is not None
    assert candidate.after.latency_ms < candidate.before.latency_ms


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.5}, {"round_to": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    program = capture(network(), inputs())
    with pytest.raises(PreconditionError, match="needs 0 < share <= 1 and round_to >= 1"):
        FactorizeLowRank(**options).requires(program, Context())


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ({"rank": 0}, "rank: Input should be greater than or equal to 1"),
        ({"rank": 12}, "0 at rank 12 would need no fewer operations than dense"),
        ({"rank": True}, "rank: Input should be a valid integer"),
        ({"in_features": 25}, "0 must be a linear layer 25 -> 16"),
        ({"bias": False}, "0 must be a linear layer"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(details: dict[str, Any], text: str) -> None:
    program = capture(network(), inputs())
    change = FACTORIZE.propose(program, Context()).candidates[0].change
    wrong = replace(change, details={**change.details, **details})
    with pytest.raises(PlanError, match=text):
        FACTORIZE.apply(program, wrong)
    with pytest.raises(PlanError, match="1 must be a linear layer"):
        FACTORIZE.apply(program, replace(change, target="1"))
    with pytest.raises(PlanError, match="0 is not the factorized layer"):
        FACTORIZE.restore(program.model, change)
