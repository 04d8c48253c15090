"""What the verifier accepts and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import find_case

from graphopt.capture import capture
from graphopt.passes.base import set_tensor
from graphopt.passes.errors import VerificationError
from graphopt.passes.program import Program
from graphopt.passes.verifier import (
    Verifier,
    observe,
    preserved,
    relative_error,
    rounding_bound,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.dropout(self.norm(self.first(x))))
        return result


def program() -> Program:
    torch.manual_seed(0)
    return capture(Block(), torch.randn(4, 8))


def scale(current: Program, name: str, factor: float) -> None:
    value = current.model.get_parameter(name).detach()
    set_tensor(current.model, name, value * factor)
    current.changed()


def test_nothing_changed_is_accepted() -> None:
    current = program()
    Verifier(current).check("idle", exact=True)


@pytest.mark.parametrize("factor", [1.001, 1 + 1e-6])
def test_an_inexact_change_is_refused_where_it_promised_exactness(factor: float) -> None:
    current = program()
    verifier = Verifier(current, training=False)
    scale(current, "second.weight", factor)
    if factor == 1.001:
        with pytest.raises(VerificationError, match="spoil promises unchanged outputs"):
            verifier.check("spoil", exact=True)
    else:
        assert rounding_bound(current) > 1e-6
        verifier.check("spoil", exact=True)


def test_values_that_are_not_finite_are_refused() -> None:
    current = program()
    verifier = Verifier(current)
    scale(current, "second.weight", float("nan"))
    with pytest.raises(VerificationError, match="spoil made output 0 not finite in training mode"):
        verifier.check("spoil", exact=False)


def test_a_cut_gradient_is_refused() -> None:
    current = program()
    verifier = Verifier(current)
    node = current.calls("second")[0]
    with current.graph.inserting_before(node):
        cut = current.graph.call_function(torch.ops.aten.detach.default, (node.args[0],))
    cut.meta = dict(node.all_input_nodes[0].meta)
    node.update_arg(0, cut)
    current.changed()
    with pytest.raises(VerificationError, match=r"spoil cut the gradient of first\.weight"):
        verifier.check("spoil", exact=False)


def test_a_missing_module_and_a_wrong_shape_are_refused() -> None:
    current = program()
    verifier = Verifier(current)
    set_tensor(current.model, "second.weight", torch.zeros(3, 5))
    with pytest.raises(VerificationError, match="does not fit its operands"):
        verifier.check("spoil", exact=False)
    del current.model._modules["second"]
    with pytest.raises(VerificationError, match="left a use of 'second', which is gone"):
        verifier.check("spoil", exact=False)


def test_another_output_form_is_refused() -> None:
    current = program()
    verifier = Verifier(current)
    set_tensor(current.model, "second.weight", torch.zeros(2, 6))
    set_tensor(current.model, "second.bias", torch.zeros(2))
    with pytest.raises(VerificationError, match=r"changed output 0 in .* from \[2, 3\]"):
        verifier.check("spoil", exact=False)


def test_an_eager_forward_of_another_function_is_said() -> None:
    current = program()
    assert Verifier(current).eager_refusal() is None
    node = current.calls("second")[0]
    with current.graph.inserting_after(node):
        double = current.graph.call_function(torch.ops.aten.mul.Tensor, (node, 2))
    double.meta = dict(node.meta)
    node.replace_all_uses_with(double, delete_user_cb=lambda user: user is not double)
    current.changed()
    refusal = Verifier(current).eager_refusal()
    assert refusal == "the original forward gives another result over the rewritten modules"


def test_observing_leaves_no_trace() -> None:
    current = program()
    before = {name: value.clone() for name, value in current.model.state_dict().items()}
    state = torch.get_rng_state()
    first = observe(current, training=True, gradients=True)
    second = observe(current, training=True, gradients=True)
    assert torch.equal(first.outputs[0], second.outputs[0])
    assert first.gradients.keys() == first.trained
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in current.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in current.model.parameters())


def test_modes_come_back_after_an_error() -> None:
    model = Block()
    model.dropout.eval()

    def interrupted() -> None:
        with preserved(model):
            model.eval()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        interrupted()
    assert model.training
    assert not model.dropout.training


@pytest.mark.parametrize(
    ("value", "reference", "error"),
    [
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([float("nan"), 1.0], [float("nan"), 1.0], 0.0),
        ([float("-inf"), 1.0], [float("-inf"), 1.0], 0.0),
        ([float("inf"), 1.0], [2.0, 1.0], float("inf")),
        ([1.0], [float("-inf")], float("inf")),
        ([1.0, 2.0], [1.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_relative_errors(value: list[float], reference: list[float], error: float) -> None:
    assert relative_error(torch.tensor(value), torch.tensor(reference)) == pytest.approx(error)


def test_the_rounding_bound_covers_rounding_and_no_more() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
    x = torch.randn(32, 64)
    current = capture(model, x)
    with torch.no_grad():
        error = relative_error(model(x), model.double()(x.double()))
    assert error < rounding_bound(current) < 1e4 * error


def test_numbers_among_the_results_are_no_tensors_to_compare() -> None:
    case = find_case("gemma3")  # beyond its window its cache returns the length as a number
    args, kwargs = case.call(2, 40, labels=False)
    current = capture(case.build(), kwargs or args)
    assert any(not isinstance(value, Tensor) for value in current.run(*current.few_rows()))
    assert Verifier(current).eager_refusal() is None
