"""Inference products on the CPU with weights arranged once: packed tiles, one batch, or dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.kernels.block_layout import BlockLayout
from graphopt.kernels.derived import derived

from .gathered_inputs import GatheredInputs
from .routes import Route, choose_route
from .row_tiles import RowTile, row_tiles

Product = Callable[[Tensor], Tensor]
"""Maps [tokens, in_features] to [tokens, out_features]."""


def packed_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, out_features: int
) -> Tensor:
    """Return `x W^T + bias`, with weights arranged at the first call and kept (`derived`)."""
    _, block_out, block_in = values.shape
    sources = (values, rows, columns) if bias is None else (values, rows, columns, bias)

    def packed() -> PackedWeight:
        return PackedWeight(
            BlockLayout(out_features, x.shape[1], block_out, block_in, rows, columns)
        )

    return derived("packed", sources, packed)(x.contiguous(), values, bias)


class PackedWeight:
    """A block-sparse weight in those forms that products on it have asked for.

    It holds no reference to the values: what is derived from a tensor must not keep it alive.
    """

    def __init__(self, layout: BlockLayout) -> None:
        """Start without a form."""
        self._layout = layout
        self._density = layout.density
        self._is_balanced = layout.is_balanced
        self._forms: dict[Route, Product] = {}

    def __call__(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Map x [tokens, in_features] to [tokens, out_features] in the fastest form."""
        route = choose_route(
            x.dtype,
            x.shape[0],
            self._layout.row_tiles,
            self._density,
            balanced=self._is_balanced,
        )
        if route not in self._forms:
            self._forms[route] = FORMS[route](values.detach(), bias, self._layout)
        return self._forms[route](x)


def _tiles(values: Tensor, bias: Tensor | None, layout: BlockLayout) -> Product:
    """Return a product per row tile, on weights that oneDNN has packed where it can."""
    tiles = [
        (tile, dense_product(side_by_side(values[tile.blocks]), _part(bias, tile)))
        for tile in _row_tiles(layout)
    ]

    def product(x: Tensor) -> Tensor:
        result = x.new_empty(x.shape[0], layout.out_features)
        groups = x.unflatten(1, (layout.column_groups, layout.block_in))
        for tile, linear in tiles:
            result[:, tile.outputs] = linear(groups.index_select(1, tile.columns).flatten(1))
        return result

    return product


def _direct(values: Tensor, bias: Tensor | None, layout: BlockLayout) -> Product:
    """Return a product per row tile that writes into its outputs.

    The bias is a last row of every matrix, met by ones: this product adds no bias on its way.
    """
    tiles = [
        (tile, _with_bias(side_by_side(values[tile.blocks]), _part(bias, tile)).t().contiguous())
        for tile in _row_tiles(layout)
    ]

    def product(x: Tensor) -> Tensor:
        result = x.new_empty(x.shape[0], layout.out_features)
        inputs = GatheredInputs(x, layout.block_in, ones=bias is not None)
        for tile, matrix in tiles:
            torch.mm(inputs(tile.columns), matrix, out=result[:, tile.outputs])
        return result

    return product


def _batched(values: Tensor, bias: Tensor | None, layout: BlockLayout) -> Product:
    """Return one product over all row tiles, which store equally many blocks.

    The bias is a last row of every matrix, met by ones.
    """
    tiles, ones = layout.row_tiles, int(bias is not None)
    biases = [None] * tiles if bias is None else bias.view(tiles, -1)
    matrices = [
        _with_bias(side_by_side(part), vector)
        for part, vector in zip(values.unflatten(0, (tiles, -1)), biases, strict=True)
    ]
    weight = torch.stack(matrices).transpose(1, 2)
    width = weight.shape[1] - ones

    def product(x: Tensor) -> Tensor:
        tokens = x.shape[0]
        gathered = x.new_empty(tiles, tokens, width + ones)
        gathered[:, :, width:] = 1
        groups = x.unflatten(1, (layout.column_groups, layout.block_in))
        chosen = groups.index_select(1, layout.columns).view(tokens, tiles, width)
        gathered[:, :, :width] = chosen.transpose(0, 1)
        return torch.bmm(gathered, weight).transpose(0, 1).reshape(tokens, layout.out_features)

    return product


def _dense(values: Tensor, bias: Tensor | None, layout: BlockLayout) -> Product:
    """Return the product with the unpacked weight."""
    return dense_product(layout.unpack(values), bias)


FORMS: dict[Route, Callable[[Tensor, Tensor | None, BlockLayout], Product]] = {
    "tiles": _tiles,
    "direct": _direct,
    "batched": _batched,
    "dense": _dense,
}


def side_by_side(values: Tensor) -> Tensor:
    """Return blocks [blocks, block_out, block_in] as one matrix [block_out, blocks * block_in]."""
    return values.transpose(0, 1).flatten(1)


def _row_tiles(layout: BlockLayout) -> Iterator[RowTile]:
    return row_tiles(layout.rows, layout.columns, layout.block_out, layout.out_features)


def _part(bias: Tensor | None, tile: RowTile) -> Tensor | None:
    return None if bias is None else bias[tile.outputs]


def _with_bias(matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Return a matrix with the bias as one more column, if there is one."""
    return matrix if bias is None else torch.cat([matrix, bias[:, None]], 1)


def dense_product(weight: Tensor, bias: Tensor | None) -> Product:
    """Return a dense layer, on weights packed by oneDNN where torch has it for this dtype.

    `F.linear` in float32 goes to another library, up to 2.3 times slower on AMD processors.
    """
    packs = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    usable = weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if not (packs and usable and weight.numel()):
        return partial(functional.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    run = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: run(x, packed, bias, "none", [], "")
