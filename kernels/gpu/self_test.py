"""A kernel's first call on a device is a check: against float64, on a small problem.

What is compared is what will run: same kernel, tile, types, block sizes and activation. A kernel
that fails to compile, to launch or to be right is replaced by the dense form, with one warning.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from graphopt.kernels.block_layout import BlockLayout
from graphopt.kernels.block_sparse_operator import block_sparse_linear_reference

from . import launch
from .tiles import Tile

__all__ = ["Product", "error_bound", "works"]

# Which product a kernel computes: "forward", "input_gradient" or "weight_gradient".
Product = str


@cache
def works(
    product: Product,
    tile: Tile,
    dtype: torch.dtype,
    device: torch.device,
    block: tuple[int, int],
    activation: str = "none",
) -> bool:
    """Return whether a kernel is right on a device; test it at the first call."""
    try:
        with torch.no_grad(), torch.inference_mode(False):
            excess = _excess(product, tile, dtype, device, block, activation)
        reason = "" if excess <= 1 else f"its error is {excess:.3g} times the bound"
    except Exception as error:  # A compiler or driver may raise anything; the dense form remains.
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    if reason:
        warnings.warn(
            f"the Triton kernel {tile.operation} ({product}, {dtype}, blocks of {block[0]}x"
            f"{block[1]}) failed its self-test on {device}, so the dense form runs: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not reason


def error_bound(
    exact: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype, tf32: bool
) -> Tensor:
    """Return the largest rounding error of a sum of products, for every element; float64.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: a float32 sum of `terms`
    products differs by at most `terms` eps times the sum of magnitudes, in any order; storing it
    adds eps of the stored type (truncated or rounded). TensorFloat-32 keeps 10 bits of each factor.

    Args:
        exact: The result in float64.
        magnitude: The same sum over absolute values of all factors.
        terms: Number of products in one sum.
        dtype: Type of the stored result.
        tf32: Whether float32 factors were rounded to TensorFloat-32.
    """
    relative = terms * torch.finfo(torch.float32).eps + (2 * 2.0**-10 if tf32 else 0.0)
    return magnitude * relative + exact.abs() * torch.finfo(dtype).eps


def _excess(
    product: Product,
    tile: Tile,
    dtype: torch.dtype,
    device: torch.device,
    block: tuple[int, int],
    activation: str,
) -> float:
    """Return the largest error over its bound; inf for a result that is not a number."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    # Two by three blocks, two of them missing; more tokens than a tile, fewer than two.
    mask = torch.tensor([[True, True, True], [False, True, False]])
    layout = BlockLayout.from_mask(mask, *block)
    rows, columns = layout.rows.to(device), layout.columns.to(device)
    few = tile.operation == "multiply_few_tokens"
    tokens = tile.span - 3 if few else max(tile.span, tile.step) + 5
    x, gradient = normal(tokens, layout.in_features), normal(tokens, layout.out_features)
    values, bias = normal(layout.blocks, *block), normal(layout.out_features)
    exact_layout = BlockLayout.from_mask(mask.to(device), *block)
    weight = exact_layout.unpack(values.double())
    a, g, w = x.double(), gradient.double(), weight
    if product == "forward":
        found = launch.forward(
            x, values, bias, rows, columns, layout.out_features, activation, tile
        )
        exact = block_sparse_linear_reference(
            a, values.double(), bias.double(), exact_layout, activation
        )
        magnitude, terms = a.abs() @ w.abs().t() + bias.double().abs(), layout.in_features + 1
    elif product == "input_gradient":
        found = launch.input_gradient(gradient, values, rows, columns, layout.in_features, tile)
        exact, magnitude, terms = g @ w, g.abs() @ w.abs(), layout.out_features
    else:
        found = launch.weight_gradient(gradient, x, rows, columns, block, tile)
        exact = exact_layout.pack(g.t() @ a)
        magnitude, terms = exact_layout.pack(g.abs().t() @ a.abs()), tokens
    bound = error_bound(exact, magnitude, terms, dtype, tile.precision == "tf32")
    # No activation here is steeper than 1.13; their own float32 arithmetic is within the slack.
    excess = (found.double() - exact).abs() / (1.2 * bound + torch.finfo(dtype).tiny)
    return float(excess.nan_to_num(nan=float("inf")).max())
