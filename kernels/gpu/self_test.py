"""A kernel's first call on a device is a check: against float64, on a small problem.

What is compared is what will run: same kernel, tile, types, block sizes and activation. A kernel
that fails to compile, to launch or to be right is replaced by the dense form, with one warning.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from . import launch
from .accuracy import Problem
from .tiles import Tile

__all__ = ["run", "works"]


@cache
def works(
    product: str,
    tile: Tile,
    dtype: torch.dtype,
    device: torch.device,
    block: tuple[int, int],
    activation: str = "none",
) -> bool:
    """Return whether a kernel is right on a device; test it at the first call.

    Args:
        product: "forward", "input_gradient" or "weight_gradient".
        tile: What it computes with.
        dtype: Type of its operands.
        device: Where it runs.
        block: Block sizes [block_out, block_in].
        activation: What it applies to the result.

    Raises:
        RuntimeError: A CUDA graph is being captured; the test cannot be part of it.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "expected block-sparse layers to have run once before a CUDA graph is captured: their "
            "first call on a device compiles and tests a kernel; run the model once, then capture"
        )
    # Two by three blocks, two of them missing; more tokens than a tile, fewer than two.
    mask = torch.tensor([[True, True, True], [False, True, False]])
    few = tile.operation == "multiply_few_tokens"
    tokens = tile.span - 3 if few else max(tile.span, tile.step) + 5
    try:
        with torch.inference_mode(False), torch.no_grad():
            problem = Problem.random(mask, block, tokens, dtype, device)
            found = run(problem, product, tile, activation)
            tf32 = tile.precision == "tf32"
            excess = problem.excess(product, found, activation=activation, tf32=tf32)
        reason = "" if excess <= 1 else f"its error is {excess:.3g} times what rounding explains"
    except Exception as error:  # A compiler or driver may raise anything; the dense form remains.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if reason:
        warnings.warn(
            f"the Triton kernel {tile.operation} ({product}, {dtype}, blocks of {block[0]}x"
            f"{block[1]}) failed its self-test on {device}, so the dense form runs: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not reason


def run(problem: Problem, product: str, tile: Tile, activation: str = "none") -> Tensor:
    """Return a product of a problem, from its kernel."""
    layout = problem.layout
    indices = (layout.rows, layout.columns)
    if product == "forward":
        operands = (problem.x, problem.values, problem.bias)
        return launch.forward(*operands, *indices, layout.out_features, activation, tile)
    if product == "input_gradient":
        return launch.input_gradient(
            problem.gradient, problem.values, *indices, layout.in_features, tile
        )
    block = (layout.block_out, layout.block_in)
    return launch.weight_gradient(problem.gradient, problem.x, *indices, block, tile)
