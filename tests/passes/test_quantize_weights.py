"""Layers in integers: rounding, ranges, outliers, errors that come true, refusals, composition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from slower_costs import SlowerCosts
from torch import Tensor, nn
from zoo import EXAMPLE, find_case, without_dropout

from graphopt.capture import capture
from graphopt.kernels import QuantizedLinear
from graphopt.passes.base import Context, set_tensor
from graphopt.passes.calibration import Calibration
from graphopt.passes.compress.quantize_weights import QuantizeWeights
from graphopt.passes.compress.rounding import (
    clipped_scales,
    round_compensated,
    round_nearest,
    stood_for,
)
from graphopt.passes.errors import PreconditionError
from graphopt.passes.manager import PassManager
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.registry import pass_named
from graphopt.passes.verifier import relative_error

INFERENCE = Context()


class PreNorm(nn.Module):
    """A residual block with a norm in front, whose outputs two layers read."""

    def __init__(self, *, norm_read_too: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 48)
        self.gate = nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32)
        self.head = nn.Linear(32, 4)
        self.norm_read_too = norm_read_too

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.down(torch.tanh(self.up(h)) * self.gate(h))
        result: Tensor = self.head(y + (h if self.norm_read_too else x))
        return result


def outlying(**options: Any) -> PreNorm:
    """Return a block whose norm makes two channels 30 times larger than the others."""
    torch.manual_seed(0)
    model = PreNorm(**options).eval()
    with torch.no_grad():
        model.norm.weight[:2] *= 30
        for linear in (model.up, model.gate):
            linear.weight[:, :2] /= 30
    return model


def inputs(rows: int = 256) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 32) @ torch.randn(32, 32)


def quantized(
    model: nn.Module, x: Any, context: Context = INFERENCE, **options: Any
) -> tuple[Program, Plan]:
    program = capture(model, x)
    step = QuantizeWeights(**options)
    return program, PassManager(passes=(step,), context=context).run(program)


def calibrated(x: Tensor, **options: Any) -> Context:
    half = len(x) // 2
    return Context(calibration=Calibration([{"x": x[:half]}, {"x": x[half:]}]), **options)


def refusals(plan: Plan) -> dict[str, str]:
    return {miss.target: miss.reason for miss in plan.misses}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 16])
def test_compensated_rounding_errs_less_than_the_nearest_on_its_inputs(
    bits: int, group_size: int
) -> None:
    torch.manual_seed(0)
    matrix, mixing = torch.randn(24, 96), torch.randn(96, 96) * torch.logspace(0, -2, 96)
    covariance = (mixing @ mixing.t()).double()
    scales = clipped_scales(matrix, bits, group_size)
    errors = []
    for integers in (
        round_nearest(matrix, scales, bits),
        round_compensated(matrix, scales, bits, covariance),
    ):
        largest = 2 ** (bits - 1)
        assert bool((integers.int() >= -largest).all())
        assert bool((integers.int() < largest).all())
        change = stood_for(integers, scales) - matrix
        errors.append(float(((change @ covariance) * change).sum()))
    assert errors[1] < errors[0] / 2


def test_compensation_has_nothing_to_do_where_inputs_are_unrelated() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(8, 40)
    scales = clipped_scales(matrix, 8)
    nearest = round_nearest(matrix, scales, 8)
    diagonal = torch.rand(40, dtype=torch.float64).diag()
    assert torch.equal(round_compensated(matrix, scales, 8, diagonal), nearest)
    nothing = torch.zeros(40, 40, dtype=torch.float64)
    assert torch.equal(round_compensated(matrix, scales, 8, nothing), nearest)


def test_scales_cut_a_large_weight_off_only_where_that_errs_less() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 256)
    matrix[:, 0] = 5.0
    for bits, cut in ((4, True), (8, False)):
        largest = matrix.abs().amax(1).double() / (2 ** (bits - 1) - 1)
        scales = clipped_scales(matrix, bits)
        assert bool((scales < largest * (1 - 1e-9)).all()) == cut
        found = stood_for(round_nearest(matrix, scales, bits), scales) - matrix
        plain = stood_for(round_nearest(matrix, largest, bits), largest) - matrix
        assert bool((found.square().sum(1) <= plain.square().sum(1)).all())
    # The large weight's channel matters most: then it is not cut off.
    power = torch.ones(256)
    power[0] = 1e6
    assert torch.equal(clipped_scales(matrix, 4, power=power), matrix.abs().amax(1).double() / 7)


SCHEMES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "dynamic-tensor": {"activations": "dynamic-tensor"},
    "static": {"activations": "static"},
    "none": {"activations": "none"},
    "4-bit groups": {"bits": 4, "group_size": 16, "activations": "none"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_predicted_errors_come_true(scheme: str) -> None:
    x = inputs()
    model = outlying()
    # The bias takes over what rounding does to the mean.
    nn.init.constant_(model.norm.bias, 3.0)
    dense = copy.deepcopy(model)
    context = calibrated(x, ignore=("gate", "down"))
    _, plan = quantized(model, x, context, smooth=0.0, **SCHEMES[scheme])
    (record,) = plan.changes
    with torch.no_grad():
        h = dense.norm(x)
        expected, actual = dense.up(h), model.up(h)
    # Errors are relative to outputs without their mean: a bias gives that.
    centered = expected - expected.mean(0)
    found = float((actual - expected).norm() / centered.norm())
    assert record.predicted_error is not None
    # 12,288 rounded outputs of 32 terms; that errors are uniform and independent is the model.
    assert 0.75 < record.predicted_error / found < 1.33


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_outliers_move_into_weights_behind_a_norm(activations: str) -> None:
    x = inputs()
    errors = []
    for smooth in (0.0, 0.5):
        model = outlying()
        dense = copy.deepcopy(model)
        context = calibrated(x, ignore=("down",))
        _, plan = quantized(model, x, context, activations=activations, smooth=smooth)
        assert ("smoothed in norm" in plan.changes[0].summary) == bool(smooth)
        # The second layer that reads the norm finds its inputs smooth already.
        assert "gate" in plan.changes[1].change.target
        with torch.no_grad():
            errors.append(relative_error(model(x), dense(x)))
    assert errors[1] < errors[0] / 3


def test_smoothing_alone_changes_nothing() -> None:
    x, model = inputs(), outlying().double()
    program = capture(model, x.double())
    step = QuantizeWeights()
    context = Context(calibration=Calibration([{"x": x.double()}]))
    candidate = next(
        item for item in step.propose(program, context).candidates if item.change.target == "up"
    )
    settled = step.settle(program, candidate, context)
    state = step.transfer(program, settled.change, context)
    expected = model.gate(model.norm(x.double()))
    for name in ("norm.weight", "norm.bias", "gate.weight"):
        assert name == "norm.bias" or not torch.equal(state[name], model.get_parameter(name))
        set_tensor(model, name, state[name])
    torch.testing.assert_close(model.gate(model.norm(x.double())), expected)


def test_static_inputs_that_no_norm_can_smooth_are_multiplied() -> None:
    x = inputs()
    errors: list[float] = []
    for smooth in (0.0, 0.5):
        model = outlying(norm_read_too=True)
        dense = copy.deepcopy(model)
        context = calibrated(x, ignore=("down",))
        _, plan = quantized(model, x, context, activations="static", smooth=smooth)
        up, gate = model.up, model.gate
        assert isinstance(up, QuantizedLinear)
        assert isinstance(gate, QuantizedLinear)
        assert up.input_multipliers is not None
        assert gate.input_multipliers is not None
        assert bool((up.input_multipliers != 1).any()) == bool(smooth)
        assert ("multiplied to be more alike" in plan.changes[0].summary) == bool(smooth)
        # So that a runtime rounds what both read once.
        assert torch.equal(up.input_multipliers, gate.input_multipliers)
        with torch.no_grad():
            hidden = dense.norm(x)
            errors.append(relative_error(model.up(hidden), dense.up(hidden)))
            # The weight is that of inputs as they come.
            assert relative_error(up.weight, dense.up.weight) < 0.02
    assert errors[1] < errors[0] / 2


def test_why_inputs_are_not_smoothed_is_said() -> None:
    x = inputs()
    _, plan = quantized(outlying(norm_read_too=True), x, calibrated(x))
    summaries = {record.change.target: record.summary for record in plan.changes}
    assert "inputs not smoothed: add" in summaries["up"]
    assert "inputs not smoothed: its input is not the output of a norm" in summaries["down"]


def test_reconstructed_weights_stand_for_rounded_inputs_too() -> None:
    x, model = inputs(), outlying()
    program = capture(model, x)
    context = calibrated(x)
    for activations in ("none", "dynamic"):
        step = QuantizeWeights(activations=activations)
        for found in step.propose(program, context).candidates:
            settled = step.settle(program, found, context)
            name = settled.change.target
            state = step.transfer(program, settled.change, context)
            rebuilt = step.reconstruct(program, settled.change, state)
            assert rebuilt is not None
            layer = model.get_submodule(name)
            assert set(rebuilt) == {f"{name}.{key}" for key, _ in layer.named_parameters()}
            matrix = model.get_parameter(f"{name}.weight").detach().double()
            change = rebuilt[f"{name}.weight"].double() - matrix
            source = program.calls(name)[0].all_input_nodes[0]
            assert context.calibration is not None
            gram = context.calibration.statistics(program, [(source, -1)])
            gram = gram if "bias" in dict(layer.named_parameters()) else gram.uncentered()
            share = ((change @ gram.covariance) * change).sum() / (
                (matrix @ gram.covariance) * matrix
            ).sum()
            assert settled.predicted_error is not None
            # The weight is held in float32.
            assert float(share) ** 0.5 == pytest.approx(settled.predicted_error, rel=1e-3)


def test_conv1d_layers_are_quantized_and_come_back_as_themselves() -> None:
    args, kwargs = find_case("gpt2").call(*EXAMPLE)
    model = without_dropout(find_case("gpt2").build()).eval()
    dense = copy.deepcopy(model)
    _, plan = quantized(model, kwargs or args)
    assert refusals(plan)["lm_head"].startswith("its output is a result of the model")
    name = "transformer.h.0.mlp.c_fc"
    layer, original = model.get_submodule(name), dense.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    assert plan.changes[0].before.size_bytes > 3 * plan.changes[0].after.size_bytes
    step = QuantizeWeights()
    for record in reversed(plan.changes):
        step.restore(model, record.change)
    restored = model.get_submodule(name)
    assert type(restored) is type(original)
    # Half a step of the largest weight of an output.
    steps = original.get_parameter("weight").abs().amax(0) / 127
    difference = restored.get_parameter("weight") - original.get_parameter("weight")
    assert bool((difference.abs() <= steps * 0.5 * (1 + 1e-5)).all() or difference.abs().max() > 0)


def test_patterns_and_measured_times_keep_layers_dense() -> None:
    x = inputs()
    context = Context(ignore=("gate",), costs=SlowerCosts(budget_s=0.01))
    _, plan = quantized(outlying(), x[:2], context)
    reasons = refusals(plan)
    assert not plan.changes
    assert reasons["gate"] == "ignored by the pattern 'gate'"
    assert reasons["up"].startswith("8 bits, dynamic inputs measured 0.")
    assert reasons["up"].endswith("x, kept dense")
    assert reasons["head"].startswith("its output is a result of the model")


def test_offers_claim_the_format_and_leave_the_structure() -> None:
    x = inputs()
    program = capture(outlying(), x)
    found = QuantizeWeights().offer(program, calibrated(x)).candidates
    up = [item for item in found if item.change.target == "up"]
    assert [item.change.summary for item in up] == [
        "32 -> 48 in 8 bits, dynamic inputs",
        "32 -> 48 in 8 bits, static inputs",
        "32 -> 48 in 4 bits in groups of 32",
    ]
    assert all(item.exclusive == {"up.weight format"} and not item.shared for item in up)
    bytes_before = 4 * (32 * 48 + 48)
    assert [item.before.size_bytes for item in up] == [bytes_before] * 3
    scales, static = 4 * 48, 4 + 1 + 4 * 32
    assert [item.after.size_bytes for item in up] == [
        32 * 48 + scales + 4 * 48,
        32 * 48 + scales + 4 * 48 + static,
        32 * 48 // 2 + scales + 4 * 48,
    ]
    assert all(item.before.flops == item.after.flops for item in up)
    asked = QuantizeWeights(activations="static").offer(program, calibrated(x)).candidates
    assert {item.change.summary.partition(" in ")[2] for item in asked} == {"8 bits, static inputs"}
    without = QuantizeWeights().offer(program, INFERENCE).candidates
    assert not any("static" in item.change.summary for item in without)


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 32, "activations": "none"}])
def test_pruned_layers_are_quantized_at_their_new_sizes(options: dict[str, Any]) -> None:
    x = inputs()
    program = capture(outlying(), x)
    step, prune = QuantizeWeights(**options), pass_named("prune-channels", round_to=8)
    context = calibrated(x, budget=0.8)
    found = {item.change.target: item for item in step.propose(program, context).candidates}
    PassManager(passes=(prune,), context=context).run(program)
    down = step.settle(program, found["down"], context)
    left = program.module("down").in_features
    assert isinstance(left, int)
    assert left < 48
    assert f"{left} -> 32" in down.change.summary
    state = step.transfer(program, down.change, context)
    step.apply(program, down.change)
    assert state["down.scales"].shape[0] == 32
    layer = program.module("down")
    assert isinstance(layer, QuantizedLinear)
    assert layer.in_features == left


def test_options_that_do_not_fit_are_refused() -> None:
    x = inputs()
    for options, text in (
        ({"bits": 3}, "needs bits 4 or 8"),
        ({"group_size": 24}, "group_size 0 or 16"),
        ({"smooth": 2.0}, "0 <= smooth <= 1"),
        ({"group_size": 16, "activations": "static"}, "knows groups with dynamic inputs"),
        ({"activations": "static"}, "needs calibration data"),
    ):
        with pytest.raises(PreconditionError, match=text):
            quantized(outlying(), x, **options)
