"""A linear layer rounded to integers: its scales, its repaired bias, its error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.kernels.quantized_inputs import range_code
from graphopt.kernels.quantized_weights import pack_integers
from graphopt.passes.base import Change, Context, State
from graphopt.passes.compress.input_survey import InputSurvey, survey
from graphopt.passes.compress.quantized_candidates import Quantization, checked
from graphopt.passes.compress.rounding import (
    clipped_scales,
    round_compensated,
    round_nearest,
    stood_for,
)
from graphopt.passes.compress.smoothing import evening_factors, smoothing_place
from graphopt.passes.linear_layers import LinearLayer
from graphopt.passes.program import Program

_WORTH_MULTIPLYING = 0.8
"""Multiplying inputs takes time: not for a smaller part of the error than the rest of this."""


@dataclass(frozen=True)
class LayerRounding:
    """What quantizing makes of a layer.

    Attributes:
        state: New values, also of a smoothed norm and of its other readers.
        relative_error: Predicted root mean square of the output's error over that of the output;
            without data that of the weight.
        error_growth: See `Quantization`.
        note: What was done about outliers of the inputs, for the summary.
    """

    state: State
    relative_error: float
    error_growth: float
    note: str


def round_layer(
    program: Program,
    change: Change,
    context: Context,
    *,
    compensate: bool,
    smooth: float,
) -> LayerRounding:
    """Round a layer as a change says.

    Args:
        program: The program as it is now.
        change: The change.
        context: Its calibration data is used, if it has some.
        compensate: Whether later channels make up for the rounding of earlier ones.
        smooth: Share of the spread of outliers in the inputs that weights take over; 0 for none.
    """
    details, layer = checked(program, change)
    calibration = context.calibration
    if calibration is None:
        fit = _without_data(details, layer)
        return LayerRounding(fit.state(change.target, details, layer), fit.error, 1.0, "")
    name = change.target
    sources = list(dict.fromkeys(node.all_input_nodes[0] for node in program.calls(name)))
    inputs = survey(program, calibration, sources)

    def fitted(factors: Tensor, *, compensate: bool = False) -> _Fit:
        return _with_data(details, layer, inputs, factors, compensate=compensate)

    chosen = ones = torch.ones_like(inputs.gram.mean_x)
    multipliers = ones.float()
    others: State = {}
    note = ""
    if smooth and details.activations != "none":
        place = smoothing_place(program, name)
        if isinstance(place, str) and details.activations == "static":
            factors = evening_factors(inputs.largest, smooth)
            if fitted(factors).error < _WORTH_MULTIPLYING * fitted(ones).error:
                chosen, multipliers = factors, (1 / factors).float()
                note = ", inputs multiplied to be more alike"
        elif isinstance(place, str):
            note = f", inputs not smoothed: {place}"
        else:
            factors = place.factors(inputs.largest, smooth)
            if fitted(factors).error < fitted(ones).error:
                chosen, others = factors, place.state(program, factors, without=name)
                note = f", inputs smoothed in {place.norm}"
    fit = fitted(chosen, compensate=compensate)
    state = {**others, **fit.state(name, details, layer)}
    if details.activations == "static":
        state[f"{name}.input_multipliers"] = multipliers.to(layer.weight.device)
    return LayerRounding(state, fit.error, fit.growth, note)


@dataclass(frozen=True)
class _Fit:
    """Integers of a layer with what they bring."""

    integers: Tensor
    scales: Tensor
    bias: Tensor | None
    inputs: InputSurvey | None
    error: float
    growth: float

    def state(self, name: str, details: Quantization, layer: LinearLayer) -> State:
        """Return the values of the quantized layer of this name."""
        state = {
            f"{name}.codes": pack_integers(self.integers, details.bits),
            f"{name}.scales": self.scales.float(),
        }
        if self.bias is not None and layer.bias is not None:
            state[f"{name}.bias"] = self.bias.to(layer.bias.dtype)
        if details.activations == "static":
            assert self.inputs is not None
            low, high = map(torch.tensor, self.inputs.range())
            scale, zero_point = range_code(low, high)
            state[f"{name}.input_scale"] = scale.to(self.scales.device)
            state[f"{name}.input_zero_point"] = zero_point.to(self.scales.device, torch.uint8)
        return state


def _without_data(details: Quantization, layer: LinearLayer) -> _Fit:
    matrix = layer.matrix.double()
    scales = clipped_scales(matrix, details.bits, details.group_size)
    integers = round_nearest(matrix, scales, details.bits)
    change = stood_for(integers, scales) - matrix
    bias = None if layer.bias is None else layer.bias.detach()
    error = float(change.norm() / matrix.norm().clamp_min(1e-300))
    return _Fit(integers, scales, bias, None, error, 1.0)


def _with_data(
    details: Quantization,
    layer: LinearLayer,
    inputs: InputSurvey,
    factors: Tensor,
    *,
    compensate: bool,
) -> _Fit:
    """Round a layer whose inputs are divided by some factors [channels], and its weight not yet."""
    matrix, inputs = layer.matrix.double() * factors, inputs.divided(factors)
    # A bias takes the mean of the error over.
    gram = inputs.gram
    used = gram.uncentered() if layer.bias is None else gram
    covariance = used.covariance / torch.outer(factors, factors)
    scales = clipped_scales(matrix, details.bits, details.group_size, covariance.diagonal())
    if compensate:
        integers = round_compensated(matrix, scales, details.bits, covariance)
    else:
        integers = round_nearest(matrix, scales, details.bits)
    rounded = stood_for(integers, scales)
    change = rounded - matrix
    bias = None
    if layer.bias is not None:
        bias = layer.bias.detach() - change @ (gram.mean_x / factors)
    groups = layer.in_features // details.group_size if details.group_size else 1
    by_inputs = inputs.noise(details.activations, groups) * float(rounded.square().sum())
    by_weight = float(((change @ covariance) * change).sum().clamp_min(0))
    energy = max(float(((matrix @ covariance) * matrix).sum()), 1e-300)
    growth = (1 + by_inputs / by_weight) ** 0.5 if by_weight > 0 else 1.0
    error = ((by_weight + by_inputs) / energy) ** 0.5
    return _Fit(integers, scales, bias, inputs, error, growth)
