"""Fusing sibling linear layers: same function and gradients, one product, refusals, replay."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from slower_costs import SlowerCosts
from torch import Tensor, nn
from torch.nn import functional
from zoo import EXAMPLE, find_case

from graphopt.capture import capture
from graphopt.kernels import FusedLinear, FusedPart
from graphopt.passes.axes import axes_of
from graphopt.passes.base import Context
from graphopt.passes.costs import Costs
from graphopt.passes.errors import PlanError
from graphopt.passes.exact.fuse_projections import FuseProjections
from graphopt.passes.facts import total_cost
from graphopt.passes.manager import PassManager, apply_plan
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.propagation import refresh
from graphopt.passes.verifier import relative_error, rounding_bound

FUSE = FuseProjections()


class Attention(nn.Module):
    """Two projections of one input and a third of another, which may be the same."""

    def __init__(self, flaw: str = "") -> None:
        super().__init__()
        self.flaw = flaw
        self.query = nn.Linear(6, 4)
        self.key = nn.Linear(6, 4, bias=flaw != "bias")
        self.value = nn.Linear(6, 4)
        if flaw == "tied":
            self.query.weight = self.key.weight
        if flaw == "hooked":
            self.key.register_forward_hook(lambda module, args, output: None)
        if flaw == "frozen":
            self.key.requires_grad_(False)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        query = self.query(x)
        if self.flaw == "write":
            query = query * x.sum().add_(1)
        key: Tensor = self.key(source)
        if self.flaw == "twice":
            key = self.key(key @ self.key.weight)
        value: Tensor = self.value(source)
        if self.flaw == "output":
            value = value.view(-1, 4).relu_().view_as(value)
        return functional.softmax(query @ key.transpose(-1, -2), -1) @ value


def fused(model: nn.Module, example: Any) -> tuple[Program, Plan]:
    program = capture(model, example)
    return program, PassManager(passes=(FUSE,), context=Context(training=True)).run(program)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_siblings_become_one_product_of_the_same_function_and_gradients() -> None:
    model = Attention().double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    dense = copy.deepcopy(model)
    program, plan = fused(model, x)
    (record,) = plan.changes
    assert record.summary == "query, key, value as one GEMM: 6 -> 4 + 4 + 4"
    assert record.before.flops == record.after.flops
    (call,) = (node for node in program.graph.nodes if node.op == "call_module")
    assert (call.target, call.kwargs) == ("query", {"part": None})
    for node in program.graph.nodes:
        assert node.op == "output" or {"val", "modules", "calls"} <= node.meta.keys()
    bound = rounding_bound(program)
    other = torch.randn(3, 4, 6, dtype=torch.float64)
    for value in (x, other):
        assert relative_error(program(value), dense(value)) <= bound
        assert relative_error(model(value), dense(value)) <= bound
    expected, actual = gradients(dense, x), gradients(model, x)
    for kind in ("weight", "bias"):
        stacked = torch.cat([expected[f"{part}.{kind}"] for part in ("query", "key", "value")])
        assert relative_error(actual[f"query.fused_{kind}"], stacked) <= bound
    assert FUSE.propose(program, Context()).candidates == ()


@pytest.mark.parametrize(
    ("name", "count"), [("bert", 2), ("llama", 4), ("t5", 4), ("swin", 4), ("modernbert", 0)]
)
def test_projections_of_real_architectures_are_found(name: str, count: int) -> None:
    case = find_case(name)
    with torch.device("meta"):
        model = case.build()
    inputs = {key: value.to("meta") for key, value in dict(case.inputs(*EXAMPLE)).items()}
    program = capture(model, inputs)
    before = total_cost(program)
    plan = PassManager(passes=(FUSE,), context=Context(training=True)).run(program)
    assert len(plan.changes) == count
    assert total_cost(program).flops == before.flops
    assert total_cost(program).parameters == before.parameters
    axes_of(program).groups()


def test_undoing_gives_the_layers_back() -> None:
    model = Attention()
    model.key.eval()
    dense = copy.deepcopy(model)
    x = torch.randn(2, 5, 6)
    _, plan = fused(model, x)
    FUSE.restore(model, plan.changes[0].change)
    assert [type(layer) for layer in model.children()] == [nn.Linear] * 3
    assert not model.key.training
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert torch.equal(model(x), dense(x))


def test_a_plan_is_replayed_on_another_call_that_tells_the_inputs_apart() -> None:
    model = Attention()
    dense = copy.deepcopy(model)
    x, memory = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    _, plan = fused(model, x)
    fresh = Attention()
    program = capture(fresh, (x, memory))
    apply_plan(program, plan)
    calls = [(n.target, n.kwargs) for n in program.graph.nodes if n.op == "call_module"]
    assert calls == [("query", {"part": part}) for part in range(3)]
    fresh.load_state_dict(model.state_dict())
    bound = rounding_bound(program)
    assert relative_error(program(x, memory), dense(x, memory)) <= bound
    assert relative_error(fresh(x, memory), dense(x, memory)) <= bound


def test_a_plan_is_replayed_on_meta_parameters() -> None:
    model = Attention()
    x = torch.randn(2, 5, 6)
    _, plan = fused(model, x)
    with torch.device("meta"):
        blank = Attention()
    program = capture(blank, x.to("meta"))
    apply_plan(program, plan)
    refresh(program)
    assert all(p.is_meta for p in blank.parameters())
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in blank.state_dict().items()} == shapes


def test_a_copy_of_the_model_trains_its_own_weights() -> None:
    model = Attention()
    x = torch.randn(2, 5, 6)
    fused(model, x)
    twin = copy.deepcopy(model)
    assert isinstance(twin.query, FusedLinear)
    assert isinstance(twin.key, FusedPart)
    assert twin.key.owner is twin.query
    assert set(gradients(twin, x)) == {"query.fused_weight", "query.fused_bias"}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("flaw", "target", "reason", "fused_layers"),
    [
        ("tied", "query", "query.weight is tied to key.weight", 0),
        ("hooked", "key", "key has hooks, which expect the module as it is", 2),
        ("twice", "key", "key is called 2 times", 2),
        ("bias", "key", "no sibling is left with the same type, bias and trained parameters", 2),
        ("frozen", "key", "no sibling is left with the same type, bias and trained parameters", 2),
        ("write", "query", "writes in place between query, key, value", 0),
        ("output", "query", "the output of value is changed in place", 0),
    ],
)
def test_what_must_stay_apart_is_refused_with_the_reason(
    flaw: str, target: str, reason: str, fused_layers: int
) -> None:
    program = capture(Attention(flaw), torch.randn(2, 5, 6))
    proposal = FUSE.propose(program, Context())
    reasons = {miss.target: miss.reason for miss in proposal.misses}
    assert reason in reasons[target]
    parts = [len(c.change.details["parts"]) for c in proposal.candidates]
    assert parts == [fused_layers] * bool(fused_layers)


def test_ignored_layers_stay_and_the_others_are_fused() -> None:
    program = capture(Attention(), torch.randn(2, 5, 6))
    proposal = FUSE.propose(program, Context(ignore=("value",)))
    (miss,) = proposal.misses
    assert (miss.target, miss.reason) == ("value", "ignored by the pattern 'value'")
    assert proposal.candidates[0].change.details["parts"] == ["query", "key"]


@pytest.mark.parametrize("training", [True, False])
def test_a_measured_loss_is_refused_with_the_number(training: bool) -> None:
    program = capture(Attention(), torch.randn(2, 5, 6))
    context = Context(costs=SlowerCosts(budget_s=0.01), training=training)
    proposal = FUSE.propose(program, context)
    assert proposal.candidates == ()
    assert proposal.misses[0].reason.startswith("query, key, value as one GEMM measured 0.")
    assert proposal.misses[0].reason.endswith("x, kept apart")


def test_a_measured_gain_is_kept_with_both_times() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(24))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([layer(x) for layer in self.layers])

    program = capture(Many().eval(), torch.randn(2, 8))
    proposal = FUSE.propose(program, Context(costs=Costs(budget_s=0.05)))
    (candidate,) = proposal.candidates
    assert candidate.before.latency_ms is not None
    assert candidate.after.latency_ms is not None
    assert candidate.after.latency_ms < candidate.before.latency_ms


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ({"parts": ["query", "missing", "value"]}, "has no module 'missing'"),
        ({"parts": ["query", "query", "value"]}, "must name each layer once"),
        ({"parts": ["query"], "sizes": [4]}, "parts: Tuple should have at least 2 items"),
        ({"sizes": [4, 4]}, "must name each layer once, with its size"),
        ({"sizes": [4, 5, 4]}, "key must be a linear layer 6 -> 5 to be fused"),
        ({"bias": False}, "query must be a linear layer"),
        ({"in_features": "6"}, "in_features: Input should be a valid integer"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(details: dict[str, Any], text: str) -> None:
    program = capture(Attention(), torch.randn(2, 5, 6))
    (candidate,) = FUSE.propose(program, Context()).candidates
    change = candidate.change
    wrong = replace(change, details={**change.details, **details})
    with pytest.raises(PlanError, match=text):
        FUSE.apply(program, wrong)
    with pytest.raises(PlanError, match="query is not the fused layer"):
        FUSE.restore(program.model, change)
