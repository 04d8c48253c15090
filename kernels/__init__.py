"""Tensors to tensors: references, operators, and the modules that hold compressed weights."""

if __name__ != "graphopt.kernels":
    raise ImportError(
        f"expected the import name graphopt.kernels, got {__name__}: write the former"
    )

from .fused_linear import FusedLinear, FusedPart, fused_linear_reference
from .low_rank import LowRankLinear, low_rank_linear_reference

__all__ = [
    "FusedLinear",
    "FusedPart",
    "LowRankLinear",
    "fused_linear_reference",
    "low_rank_linear_reference",
]
