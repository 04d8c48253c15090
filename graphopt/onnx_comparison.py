"""How far an output of ONNX Runtime may be from torch's, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .flat_model import FlatModel
from .onnx_runtime import shapes_text

ROUNDING_FACTOR = 16
"""How many times torch's own rounding error two correct runtimes may differ.

Both round every operation, in another order and with other approximations of exp, erf and tanh;
measured on the architectures in tests/zoo.py the ratio stayed below 5.
"""

LARGEST_DRIFT = 0.25
"""How far apart, relative in norm, two correct runtimes may be of a model in integers."""


@dataclass(frozen=True)
class Comparison:
    """One output at one set of inputs.

    Attributes:
        output: Name of the output.
        shapes: Input names and their shapes.
        difference: Largest absolute difference between ONNX Runtime and torch; its root mean
            square if layers round to integers.
        bound: Largest difference that rounding explains (see `compare`).
        mismatch: What else differs (shape, type, where NaN or infinity is), empty if nothing.
    """

    output: str
    shapes: Mapping[str, tuple[int, ...]]
    difference: float
    bound: float
    mismatch: str = ""

    @property
    def failure(self) -> str | None:
        """One sentence if the output differs, else None."""
        where = f"output {self.output!r} at {shapes_text(self.shapes)}"
        if self.mismatch:
            return f"{where} differs from torch: {self.mismatch}"
        if self.difference <= self.bound:
            return None
        return (
            f"{where} differs from torch by {self.difference:.3g}, "
            f"and rounding explains at most {self.bound:.3g}"
        )


def compare(
    output: str,
    shapes: Mapping[str, tuple[int, ...]],
    actual: torch.Tensor,
    expected: torch.Tensor,
    exact: torch.Tensor,
    unit_roundoff: float,
    integer_roundoff: float = 0.0,
) -> Comparison:
    """Compare one output of ONNX Runtime with torch's.

    A floating-point output may differ by
    `min(16 * max(torch's rounding error, u * scale), sqrt(u) * scale)`, all in the maximum norm:
    the rounding error is measured against float64 arithmetic, u is the unit roundoff and scale
    the largest absolute value. The second term stands in where torch rounds by luck hardly at
    all, and the last one keeps an ill-conditioned model from excusing everything. Integers and
    booleans, and the places of NaN and infinity, must be equal.

    Where layers round to integers, a value that differs in the last bit may round to the
    neighbouring one, and that makes more of them in the next layer: two correct runtimes end as far
    apart as rounding noise is large, and some elements by much more. Root mean squares are compared
    there, with 16 times the noise, a quarter of the output at most.

    Args:
        output: Name of the output.
        shapes: Input names and their shapes.
        actual: The output of ONNX Runtime.
        expected: The output of torch.
        exact: The output of torch in float64 arithmetic.
        unit_roundoff: Of the coarsest floating-point type that the model uses.
        integer_roundoff: Of all layers that round to integers together (see `integer_roundoff_of`).
    """
    mismatch = ""
    if actual.shape != expected.shape:
        mismatch = f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    elif actual.dtype != expected.dtype:
        mismatch = f"{actual.dtype} instead of {expected.dtype}"
    elif not torch.equal(_special_values(actual), _special_values(expected)):
        mismatch = "NaN or infinity in other places"
    if mismatch:
        return Comparison(output, shapes, float("inf"), 0.0, mismatch)
    finite = torch.isfinite(expected)
    wanted, found = expected[finite].to(torch.float64), actual[finite].to(torch.float64)
    difference = _largest(found - wanted)
    if not expected.is_floating_point():
        return Comparison(output, shapes, difference, 0.0)
    if integer_roundoff:
        bound = min(ROUNDING_FACTOR * integer_roundoff, LARGEST_DRIFT) * _root_mean_square(wanted)
        return Comparison(output, shapes, _root_mean_square(found - wanted), bound)
    scale = _largest(wanted)
    rounding = _largest(exact[finite].to(torch.float64).nan_to_num(0.0) - wanted)
    bound = min(ROUNDING_FACTOR * max(rounding, unit_roundoff * scale), unit_roundoff**0.5 * scale)
    return Comparison(output, shapes, difference, bound)


def unit_roundoff_of(flat: FlatModel) -> float:
    """Return the unit roundoff of the coarsest floating-point type in a model."""
    kinds = {tensor.dtype for tensor in (*flat.parameters(), *flat.example)}
    kinds = {kind for kind in kinds if kind.is_floating_point} or {torch.float32}
    return max(torch.finfo(kind).eps for kind in kinds) / 2


def integer_roundoff_of(flat: FlatModel) -> float:
    """Return the relative error of all layers that round to integers together, 0 without any.

    A random walk: the layers' own errors are independent, and their variances add up.
    """
    modules = (float(getattr(module, "unit_roundoff", 0.0)) for module in flat.modules())
    return math.hypot(*modules)


def _special_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return 0 for finite values, 1 for NaN, 2 and 3 for the infinities."""
    kinds = torch.isnan(tensor).to(torch.uint8)
    if tensor.is_floating_point():
        kinds = kinds + 2 * torch.isposinf(tensor) + 3 * torch.isneginf(tensor)
    return kinds


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
