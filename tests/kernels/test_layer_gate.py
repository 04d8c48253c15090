"""The gate that leaves a block out: its schedule, its draws, its gradients."""

import pytest
import torch
from torch import Tensor, nn

from graphopt.kernels.layer_gate import LayerGate

STEPS = 2000


def decisions(gate: LayerGate, steps: int = STEPS) -> list[bool]:
    found = []
    for step in range(steps):
        gate.advance(step, gate.progress)
        found.append(gate.skips())
    return found


def skipping(gate: LayerGate, wanted: bool = True) -> LayerGate:
    """Advance a gate to a step in which it leaves its block out, or does not."""
    step = decisions(gate, 200).index(wanted)
    gate.advance(step, gate.progress)
    return gate


def test_the_rate_stays_and_then_falls_to_nothing() -> None:
    gate = LayerGate(rate=0.4, plateau=0.5)
    found = []
    for progress in (0.0, 0.5, 0.75, 1.0, 1.2):
        gate.advance(0, progress)
        found.append(1 - gate.keep)
    assert found == pytest.approx([0.4, 0.4, 0.2, 0, 0], abs=1e-12)
    assert LayerGate(rate=0.4, plateau=1.0).keep == 0.6


def test_a_finished_training_leaves_nothing_out() -> None:
    gate = LayerGate(rate=0.9)
    gate.advance(0, 1.0)
    assert not any(decisions(gate))


def test_draws_follow_seed_number_and_step_alone() -> None:
    first = decisions(LayerGate(rate=0.3, seed=5, number=2))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert decisions(LayerGate(rate=0.3, seed=5, number=2)) == first
    assert torch.equal(torch.get_rng_state(), state)
    # Four standard deviations of a mean of 2000 draws.
    assert sum(first) / STEPS == pytest.approx(0.3, abs=4 * (0.21 / STEPS) ** 0.5)
    for other in (LayerGate(rate=0.3, seed=6, number=2), LayerGate(rate=0.3, seed=5, number=3)):
        assert decisions(other) != first


def test_without_a_clock_training_forwards_are_the_steps() -> None:
    wanted = decisions(LayerGate(rate=0.5, seed=1), 40)
    gate, x = LayerGate(rate=0.5, seed=1), torch.ones(2)
    found = []
    for _ in range(40):
        found.append(torch.equal(gate.run(x, lambda: x + 1), x))
        gate.eval()
        assert torch.equal(gate.run(x, lambda: x + 1), x + 1)
        gate.train()
    assert found == wanted


def test_evaluation_returns_what_the_block_does() -> None:
    gate = skipping(LayerGate(rate=0.9)).eval()
    x, y = torch.randn(3), torch.randn(3)
    assert gate.run(x, lambda: y) is y
    assert gate(y, entry=x) is y
    assert gate.state_dict() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_expectation_is_the_plain_block(dtype: torch.dtype) -> None:
    gate = LayerGate(rate=0.25)
    x, branch = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    run = skipping(gate, False).run(x, lambda: x + branch)
    left_out = skipping(gate).run(x, lambda: x + branch)
    assert run.dtype == dtype
    assert torch.equal(left_out, x)
    mean = 0.75 * run.double() + 0.25 * left_out.double()
    # The sum, the correction by a third of the difference, and the result are rounded.
    size = x.double().abs() + branch.double().abs()
    assert ((mean - x.double() - branch.double()).abs() <= 4 * torch.finfo(dtype).eps * size).all()


def test_a_block_left_out_is_not_computed_and_its_parameters_get_zeros() -> None:
    layer, scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
    frozen = nn.Parameter(torch.ones(4), requires_grad=False)
    x = torch.randn(2, 4, requires_grad=True)

    def block() -> Tensor:
        raise AssertionError("the block ran")

    gate = skipping(LayerGate(rate=0.5))
    y = gate.run(x, block, (layer, scale, frozen, layer, torch.ones(1), False))
    y.add_(1)  # A copy: the entry stays.
    y.square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * (x + 1))
    for parameter in (layer.weight, layer.bias, scale):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert frozen.grad is None
    with torch.no_grad():
        assert torch.equal(gate.run(x, block, (layer,)), x)


def test_an_entry_of_another_type_takes_that_of_the_result() -> None:
    """Under autocast an entry may be bfloat16 where the sum is float32."""
    gate = skipping(LayerGate(rate=0.5), False)
    x = torch.ones(3, dtype=torch.bfloat16)
    assert torch.equal(gate.run(x, lambda: torch.full((3,), 2.0)), torch.full((3,), 3.0))
