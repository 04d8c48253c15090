"""Block-sparse products on the CPU: gather the inputs of a row tile, multiply into its outputs.

A row tile's blocks side by side are one dense matrix [block_out, blocks * block_in]; its inputs are
gathered in groups of `block_in` that lie together in memory. So all arithmetic is in dense
products of the math library. The bias is one more column of that matrix, met by a column of ones:
one more step of a long product costs next to nothing, a second pass over the outputs a tenth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.block_sparse_operator import apply_activation, check_operands

from .gathered_inputs import GatheredInputs
from .packed import packed_linear, side_by_side
from .row_tiles import row_tiles

_FEW_TILES = 4


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
    if inference:
        product = packed_linear(x, values, bias, rows, columns, out_features)
        return apply_activation(product, activation)
    result = x.new_empty(x.shape[0], out_features)
    inputs = GatheredInputs(x, values.shape[2], ones=bias is not None)
    for tile in row_tiles(rows, columns, values.shape[1], out_features):
        matrix = _tile_matrix(values[tile.blocks], None if bias is None else bias[tile.outputs])
        torch.mm(inputs(tile.columns), matrix.t(), out=result[:, tile.outputs])
    return result


def block_sparse_linear_input_gradient(
    gradient: Tensor, values: Tensor, rows: Tensor, columns: Tensor, in_features: int
) -> Tensor:
    """Return `gradient W` [tokens, in_features]."""
    _, block_out, block_in = values.shape
    tokens, out_features = gradient.shape
    # A few tiles are summed in their own dtype, many in float32: each sum rounds once more.
    many = out_features // block_out > _FEW_TILES and gradient.dtype.itemsize == 2
    dtype = torch.float32 if many else gradient.dtype
    result = gradient.new_zeros(tokens, in_features // block_in, block_in, dtype=dtype)
    for tile in row_tiles(rows, columns, block_out, out_features):
        product = torch.mm(gradient[:, tile.outputs], side_by_side(values[tile.blocks]))
        groups = product.view(tokens, tile.columns.numel(), block_in)
        result.index_add_(1, tile.columns, groups.to(dtype))
    return result.view(tokens, in_features).to(gradient.dtype)


def block_sparse_linear_weight_gradient(
    gradient: Tensor, x: Tensor, rows: Tensor, columns: Tensor, block_out: int, block_in: int
) -> Tensor:
    """Return the stored blocks of `gradient^T x` [blocks, block_out, block_in]."""
    result = x.new_empty(rows.shape[0], block_out, block_in)
    inputs = GatheredInputs(x, block_in, ones=False)
    for tile in row_tiles(rows, columns, block_out, gradient.shape[1]):
        product = torch.mm(gradient[:, tile.outputs].t(), inputs(tile.columns))
        result[tile.blocks] = product.view(block_out, tile.columns.numel(), block_in).transpose(
            0, 1
        )
    return result


def _tile_matrix(values: Tensor, bias: Tensor | None) -> Tensor:
    """Return blocks side by side [block_out, blocks * block_in], and the bias as last column."""
    if bias is None:
        return side_by_side(values)
    _, block_out, block_in = values.shape
    width = values.shape[0] * block_in
    matrix = values.new_empty(block_out, width + 1)
    matrix[:, :width].view(block_out, values.shape[0], block_in).copy_(values.transpose(0, 1))
    matrix[:, width] = bias
    return matrix
