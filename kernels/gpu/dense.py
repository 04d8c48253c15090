"""The same products through the dense weight: what runs where no kernel runs or pays.

The weight is made at every call, at the cost of writing it once or twice. A kept one would be
wrong after changes that torch does not count (averaged weights, gathered shards), and to look for
these, a call would wait for the device longer than it takes to make it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from graphopt.kernels.block_sparse_operator import apply_activation

__all__ = ["forward", "input_gradient", "weight_gradient"]


def forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    out_features: int,
    activation: str,
) -> Tensor:
    """Return `activation(x W^T + bias)` [tokens, out_features]."""
    weight = _weight(values, rows, columns, out_features, x.shape[1])
    return apply_activation(functional.linear(x, weight, bias), activation)


def input_gradient(
    gradient: Tensor, values: Tensor, rows: Tensor, columns: Tensor, in_features: int
) -> Tensor:
    """Return `gradient W` [tokens, in_features]."""
    return gradient @ _weight(values, rows, columns, gradient.shape[1], in_features)


def weight_gradient(
    gradient: Tensor, x: Tensor, rows: Tensor, columns: Tensor, block: tuple[int, int]
) -> Tensor:
    """Return the stored blocks of `gradient^T x` [blocks, block_out, block_in]."""
    block_out, block_in = block
    product = gradient.t() @ x
    tiled = product.view(product.shape[0] // block_out, block_out, -1, block_in)
    return tiled[rows.long(), :, columns.long()].contiguous()


def _weight(
    values: Tensor, rows: Tensor, columns: Tensor, out_features: int, in_features: int
) -> Tensor:
    """Return W [out_features, in_features]: 0 where no block is stored.

    `BlockLayout.unpack` without the checks, which wait for the device.
    """
    _, block_out, block_in = values.shape
    weight = values.new_zeros(out_features, in_features)
    tiled = weight.view(out_features // block_out, block_out, in_features // block_in, block_in)
    tiled.transpose(1, 2).index_put_((rows.long(), columns.long()), values)
    return weight
