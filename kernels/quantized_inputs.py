"""Inputs as 8-bit integers: per token, per tensor, or with calibrated ranges."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "range_code", "round_inputs"]

ACTIVATIONS = ("dynamic", "dynamic-tensor", "static", "none")
"""How inputs become integers.

`dynamic`: symmetric, a scale per token (and per group, where weights have groups).
`dynamic-tensor`: asymmetric, from the smallest and largest value of the call, as the ONNX operator
DynamicQuantizeLinear does it. `static`: asymmetric, calibrated. `none`: they stay floating-point.
"""

TINIEST = 1e-30
"""Tokens below it are zeros."""


def range_code(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point (both in the type of `low`) that cover a range and zero."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, (-low / scale).round().clamp(0, 255)


def round_inputs(
    x: Tensor,
    activations: str,
    groups: int = 1,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Return the numbers that the integers of an input stand for: the specification of all forms.

    Args:
        x: [tokens, in_features], float32 or float64.
        activations: One of `ACTIVATIONS`.
        groups: Groups of inputs with their own scale; only `dynamic` has more than one.
        scale: Scale [] of `static` inputs.
        zero_point: The integer [] that stands for 0 in `static` inputs.
    """
    if activations == "none":
        return x
    if activations == "dynamic":
        parts = x.unflatten(1, (groups, -1))
        largest = parts.abs().amax(2, keepdim=True).clamp_min(TINIEST)
        rounded: Tensor = (parts * (127 / largest)).round() * (largest / 127)
        return rounded.flatten(1)
    if activations == "dynamic-tensor":
        if not x.numel():
            return x
        scale, zero_point = range_code(*torch.aminmax(x))
    assert scale is not None
    assert zero_point is not None
    scale, zero_point = scale.to(x.dtype), zero_point.to(x.dtype)
    return ((x / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale
