"""Residual blocks that are left out: in training steps, or for good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from residual_stack import TRAINING, Stack, X, blocks_of, changed, reasons
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from zoo import EXAMPLE, find_case, without_dropout

import graphopt
from graphopt.capture import capture
from graphopt.kernels.layer_gate import LayerGate
from graphopt.passes.base import Context
from graphopt.passes.errors import ConfigError
from graphopt.passes.facts import facts_of
from graphopt.passes.gates.gate_layers import GateLayers
from graphopt.passes.program import Program
from graphopt.passes.structure import flatten
from graphopt.passes.tokens import residual_stream
from graphopt.testing import assert_same_outputs


@pytest.fixture(scope="module")
def stack() -> Program:
    """A program to propose for; nobody changes it."""
    return capture(Stack(), (X,))


def gates(model: nn.Module) -> list[LayerGate]:
    return [module for module in model.modules() if isinstance(module, LayerGate)]


def advance(model: nn.Module, wanted: Callable[[list[bool]], bool], progress: float = 0.0) -> int:
    """Advance all gates to the first step whose decisions are wanted; return how many skip."""
    for step in range(2000):
        for gate in gates(model):
            gate.advance(step, progress)
        found = [gate.skips() for gate in gates(model)]
        if wanted(found):
            return sum(found)
    raise AssertionError("no such step")


def test_every_block_but_the_first_gets_a_rate_by_its_depth() -> None:
    case = find_case("transformer-encoder")
    args, kwargs = case.call(*EXAMPLE)
    program = capture(case.build(), kwargs or args)
    proposal = GateLayers(rate=0.3).propose(program, TRAINING)
    blocks = sum(len(chain.regions) for chain in residual_stream(program).chains)
    rates = [candidate.change.details["rate"] for candidate in proposal.candidates]
    assert rates == pytest.approx([0.3 * depth / blocks for depth in range(2, blocks + 1)])
    assert [miss.reason for miss in proposal.misses] == ["the first block always runs"]


@pytest.mark.parametrize("name", ["bert-classifier", "resnet"])
def test_evaluation_is_that_of_the_plain_model_to_the_last_bit(name: str) -> None:
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE)
    model = case.build().eval()
    optimized = graphopt.optimize(model, kwargs or args, recipe=[GateLayers(rate=0.9)])
    assert gates(optimized)
    for gate in gates(optimized):
        gate.advance(3, 0.0)
    with torch.no_grad():
        found, wanted = optimized(*args, **kwargs), model(*args, **kwargs)
    for value, reference in zip(flatten(found)[0], flatten(wanted)[0], strict=True):
        assert torch.equal(value, reference)
    assert optimized.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["transformer-encoder", "gpt2"])
def test_steps_without_blocks_cost_less_by_these(name: str) -> None:
    """Post-norm, and a pre-norm decoder whose keys and values are a result."""
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE)
    program, plan = changed(without_dropout(case.build()), kwargs or args, GateLayers(rate=0.9))
    model, tensors = program.model.train(), flatten(program.example)[0]
    facts = facts_of(program)
    every = sum(node.forward_flops for node in facts.nodes.values())

    def executed() -> int:
        with FlopCounterMode(display=False) as counter:
            program.run(*tensors)
        return int(counter.get_total_flops())

    advance(model, lambda found: not any(found))
    dense = executed()
    advance(model, all)
    saved = dense - executed()
    regions = {
        region.add: region for chain in residual_stream(program).chains for region in chain.regions
    }
    gated = [node.args[0] for node in program.graph.nodes if "layer_gate" in str(node.target)]
    wanted = facts.cost([node for add in gated for node in regions[add].nodes]).flops
    assert len(gated) == len(plan.changes)
    assert 0 < wanted < every
    # Attention counts differently where torch decomposes it; the rest of a block does not.
    assert saved == pytest.approx(wanted, rel=0.05)


def test_a_block_runs_divided_by_its_probability_or_not_at_all() -> None:
    program, _ = changed(Stack(), (X,), GateLayers(rate=0.8))
    model = program.model.double().train()
    x = X.double()
    for step in range(12):
        for gate in gates(model):
            gate.advance(step, 0.25)
        first, *others = blocks_of(model)
        h = first(x)
        for block, gate in zip(others, gates(model), strict=True):
            branch = block(h) - h
            h = h if gate.skips() else h + branch / gate.keep
        assert_same_outputs(program.run(x)[0], model.get_submodule("head")(h), bound=1e-13)


def test_every_parameter_has_a_gradient_in_every_step() -> None:
    program, _ = changed(Stack(), (X,), GateLayers(rate=0.9))
    model = program.model.train()
    assert advance(model, all) == 3
    program.run(X)[0].square().sum().backward()
    first, *others = blocks_of(model)
    skipped = [p for block in others for p in block.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in skipped)
    running = [*first.parameters(), *model.get_submodule("head").parameters()]
    assert all(p.grad is not None and p.grad.any() for p in running)


def test_training_ends_as_the_plain_model() -> None:
    program, _ = changed(Stack(), (X,), GateLayers(rate=0.9, plateau=0.25))
    model = program.model.train()
    for gate in gates(model):
        gate.advance(5, 1.0)
    assert torch.equal(program.run(X)[0], Stack()(X))


def test_gates_of_one_seed_draw_different_numbers(stack: Program) -> None:
    proposal = GateLayers(seed=3, plateau=0.25).propose(stack, TRAINING)
    details = [candidate.change.details for candidate in proposal.candidates]
    assert [(one["seed"], one["plateau"]) for one in details] == [(3, 0.25)] * 3
    assert len({one["number"] for one in details}) == 3


def test_installed_models_skip_in_their_blocks_and_their_checkpoints(tmp_path: Path) -> None:
    """Hooks on blocks see them called; activation checkpointing repeats the decision."""
    model = graphopt.optimize(Stack(), (X,), recipe=[GateLayers(rate=0.9)]).train()
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith((".up", "blocks.3")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    advance(model, all)
    wanted = model(X)
    assert calls == ["blocks.0.up", "blocks.3"]
    wanted.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    found = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False)
    found.square().sum().backward()
    assert torch.equal(found, wanted)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    graphopt.save(model, tmp_path / "out")
    loaded = graphopt.load(tmp_path / "out", base=Stack()).train()
    assert [gate.rate for gate in gates(loaded)] == [gate.rate for gate in gates(model)]
    advance(loaded, all)
    assert torch.equal(loaded(X), wanted)


def test_a_gate_is_no_child_of_a_container_that_calls_its_children() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
            return result

    torch.manual_seed(0)
    inner = [Residual(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3)]
    model = nn.Sequential(*inner, nn.Linear(8, 2)).eval()
    optimized = graphopt.optimize(model, (X,), recipe=[GateLayers(rate=0.9)])
    assert len(gates(optimized)) == 2
    assert [len(list(optimized[number].children())) for number in range(3)] == [3, 3, 3]  # type: ignore[index]
    with torch.no_grad():
        assert torch.equal(optimized(X), model(X))
    # Another call runs the model's own forward.
    assert_same_outputs(optimized(X[0]), model(X[0]), bound=1e-6)
    optimized.train()
    advance(optimized, all)
    assert_same_outputs(optimized(X), inner[0](X) @ model[3].weight.T + model[3].bias, bound=1e-6)


class Writing(nn.Module):
    """Blocks that write in place: to their sum (harmless) or to what they start from."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.where = where
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        for layer in self.layers:
            y = layer(x)
            if self.where == "sum":
                y += x
                x = y.relu_()
            else:
                view = x.view(-1, 8)
                x = x + layer(view.relu_()).view_as(y)
        return x


def test_writing_in_place() -> None:
    program, _ = changed(Writing("sum"), (X,), GateLayers(rate=0.9))
    advance(program.model.train(), all)
    first = (X + program.model.get_submodule("layers.0")(X)).relu()
    assert_same_outputs(program.run(X)[0], first, bound=1e-6)
    found = reasons(Writing("entry"), (X,), GateLayers(), TRAINING)
    assert any("it writes in place to" in reason for reason in found)


def test_what_a_pass_leaves_alone(stack: Program) -> None:
    ignoring = Context(training=True, ignore=("blocks.2.up",))
    found = GateLayers().propose(stack, ignoring)
    assert [candidate.change.target for candidate in found.candidates] == ["blocks.1", "blocks.3"]
    assert any("ignored by the pattern 'blocks.2.up'" in miss.reason for miss in found.misses)
    misses = GateLayers(rate=0.0).propose(stack, TRAINING).misses
    assert {miss.reason for miss in misses} == {"the first block always runs", "the rate is 0"}
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    (reason,) = reasons(plain, (X,), GateLayers(), TRAINING)
    assert reason == "no value is added to something that a layer computes from it"


class Caching(nn.Module):
    """A stack that also returns what its blocks compute inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack(3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        cache = []
        for number, block in enumerate(blocks_of(self)):
            h = block.up(block.norm(x))
            branch = block.down(functional.gelu(h))
            cache.append(h.mean(-1) if number < 2 else branch)
            x = x + branch
        return x, *cache


def test_values_that_are_also_results_are_computed_in_any_case() -> None:
    """Half of one block is left to save, and nothing of a block whose very result is read."""
    program, plan = changed(Caching(), (X,), GateLayers(rate=0.9))
    assert [record.change.target for record in plan.changes] == ["stack.blocks.1"]
    (last,) = [miss for miss in plan.misses if miss.target == "stack.blocks.2"]
    assert "inside of it is also read outside; take a call without these" in last.reason
    assert last.reason.endswith("that leaves 0% of it to save")
    model = program.model.train()
    wanted = [value.detach() for value in Caching()(X)]
    advance(model, all)
    x, first, second, _ = program.run(X)
    assert torch.equal(first, wanted[1])
    assert torch.equal(second, wanted[2])
    assert not torch.equal(x, wanted[0])
    found = reasons(Caching(), (X,), GateLayers(remove=1), TRAINING)
    assert sum("inside of it is also read outside" in reason for reason in found) == 3


@pytest.mark.parametrize(
    "options", [{"rate": 1.0}, {"rate": -0.1}, {"plateau": 2.0}, {"remove": -1}]
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="gate-layers takes a rate from 0 to below 1"):
        GateLayers(**options)


@pytest.mark.parametrize("step", [GateLayers(rate=0.9), GateLayers(remove=1)], ids=repr)
def test_both_forms_export(step: GateLayers, tmp_path: Path) -> None:
    model = graphopt.optimize(Stack(), (X,), recipe=[step])
    report = graphopt.export_onnx(model, tmp_path / "model.onnx", (X,))
    assert report.verification.failure is None
