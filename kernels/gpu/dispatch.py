"""The operators on CUDA devices: choose the Triton kernel or the dense form, align, call.

A kernel runs where triton is installed, the device and the blocks are ones it takes, the table
expects it to beat the dense product, and its self-test passed. Everything else is dense.
"""

from __future__ import annotations

from torch import Tensor

from graphopt.kernels.block_sparse_operator import check_operands

from . import dense
from .tiles import Tile, architecture, expected_efficiency, find_tile, precision, takes_blocks
from .triton_package import triton_is_installed

__all__ = [
    "block_sparse_linear",
    "block_sparse_linear_input_gradient",
    "block_sparse_linear_weight_gradient",
]

# Addresses are multiples of 16 bytes and row strides of 16 elements: the kernels load 16 bytes at a
# time and take every offset for such a multiple.
_ALIGNMENT = 16


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    out_features: int,
    activation: str = "none",
    inference: bool = False,
) -> Tensor:
    """Return `activation(x W^T + bias)` [tokens, out_features]."""
    check_operands(x, values, bias, out_features, activation, inference)
    block = (values.shape[1], values.shape[2])
    density = values.numel() / (out_features * x.shape[1])
    tile = _tile("forward", x, block, density, activation)
    if tile is None:
        return dense.forward(x, values, bias, rows, columns, out_features, activation)
    from . import launch

    vector = None if bias is None else bias.contiguous()
    operands = (_aligned(x), _aligned(values), vector)
    return launch.forward(*operands, rows, columns, out_features, activation, tile)


def block_sparse_linear_input_gradient(
    gradient: Tensor, values: Tensor, rows: Tensor, columns: Tensor, in_features: int
) -> Tensor:
    """Return `gradient W` [tokens, in_features]."""
    block = (values.shape[1], values.shape[2])
    density = values.numel() / (gradient.shape[1] * in_features)
    tile = _tile("input_gradient", gradient, block, density)
    if tile is None:
        return dense.input_gradient(gradient, values, rows, columns, in_features)
    from . import launch

    operands = (_aligned(gradient), _aligned(values))
    return launch.input_gradient(*operands, rows, columns, in_features, tile)


def block_sparse_linear_weight_gradient(
    gradient: Tensor, x: Tensor, rows: Tensor, columns: Tensor, block_out: int, block_in: int
) -> Tensor:
    """Return the stored blocks of `gradient^T x` [blocks, block_out, block_in]."""
    block = (block_out, block_in)
    density = rows.numel() * block_out * block_in / (gradient.shape[1] * x.shape[1])
    tile = _tile("weight_gradient", x, block, density)
    if tile is None:
        return dense.weight_gradient(gradient, x, rows, columns, block)
    from . import launch

    return launch.weight_gradient(_aligned(gradient), _aligned(x), rows, columns, block, tile)


def _tile(
    product: str, operand: Tensor, block: tuple[int, int], density: float, activation: str = "none"
) -> Tile | None:
    """Return the tile to run a product with, or None for the dense form."""
    kind, name = precision(operand.dtype), architecture(operand.device)
    tokens = operand.shape[0]
    if kind is None or name is None or not takes_blocks(*block) or not tokens:
        return None
    operation = "weight_gradient" if product == "weight_gradient" else "multiply"
    side = block[1] if product == "input_gradient" else block[0]
    tile = find_tile(operation, kind, name, side, tokens, activation)
    if density >= expected_efficiency(tile, side) or not triton_is_installed():
        return None
    from .self_test import works

    passed = works(product, tile, operand.dtype, operand.device, block, activation)
    return tile if passed else None


def _aligned(operand: Tensor) -> Tensor:
    """Return the operand, copied if its memory is not laid out as the kernels read it."""
    rows_lie_together = (
        operand.stride(-1) == 1 and operand.stride(0) % _ALIGNMENT == 0
        if operand.dim() == 2
        else operand.is_contiguous()
    )
    # A row stride below the width means rows that overlap: an expanded gradient.
    if operand.dim() == 2 and operand.stride(0) < operand.shape[1]:
        rows_lie_together = False
    laid_out = operand if rows_lie_together else operand.contiguous()
    return laid_out if laid_out.data_ptr() % _ALIGNMENT == 0 else laid_out.clone()
