"""The same products through the dense weight: what runs where no kernel runs or pays."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.kernels.block_sparse_operator import apply_activation

from .derived import Derived

__all__ = ["forward", "input_gradient", "weight_gradient"]

_weights: Derived[Tensor] = Derived()


def forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    out_features: int,
    activation: str,
    inference: bool,
) -> Tensor:
    """Return `activation(x W^T + bias)` [tokens, out_features]; in inference W is kept."""

    def weight() -> Tensor:
        return dense_weight(values, rows, columns, out_features, x.shape[1])

    kept = inference and not torch.is_grad_enabled()
    sizes = (out_features, x.shape[1])
    matrix = _weights.get((values, rows, columns), sizes, weight) if kept else weight()
    return apply_activation(functional.linear(x, matrix, bias), activation)


def input_gradient(
    gradient: Tensor, values: Tensor, rows: Tensor, columns: Tensor, in_features: int
) -> Tensor:
    """Return `gradient W` [tokens, in_features]."""
    return gradient @ dense_weight(values, rows, columns, gradient.shape[1], in_features)


def weight_gradient(
    gradient: Tensor, x: Tensor, rows: Tensor, columns: Tensor, block: tuple[int, int]
) -> Tensor:
    """Return the stored blocks of `gradient^T x` [blocks, block_out, block_in]."""
    block_out, block_in = block
    product = gradient.t() @ x
    tiled = product.view(product.shape[0] // block_out, block_out, -1, block_in)
    return tiled[rows.long(), :, columns.long()].contiguous()


def dense_weight(
    values: Tensor, rows: Tensor, columns: Tensor, out_features: int, in_features: int
) -> Tensor:
    """Return W [out_features, in_features]: 0 where no block is stored.

    `BlockLayout.unpack` without the checks, which wait for the device.
    """
    _, block_out, block_in = values.shape
    tiles, groups = out_features // block_out, in_features // block_in
    tiled = values.new_zeros(tiles, groups, block_out, block_in)
    tiled.index_put_((rows.long(), columns.long()), values)
    return tiled.transpose(1, 2).reshape(out_features, in_features)
