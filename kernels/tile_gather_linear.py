"""The plain form of a block-sparse layer, for runtimes that know matrix products and no blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .block_layout import BlockLayout

__all__ = ["TileGatherLinear"]


class TileGatherLinear(nn.Module):
    """`y = x W^T + b` by one dense product per row tile, over the inputs that the tile reads.

    Made of gather, product, sum and concatenation only, with constant operands, so it becomes
    standard nodes in any exported format. It has no parameters and is not trained.

    Why so, in ONNX Runtime (float32, 128 tokens, tiles of 256 to 1024): gathering single columns
    instead of groups makes the layer 1.3 to 2.4 times slower, and one batched product for all
    tiles 11 to 25 % slower, for its two transpositions. A bias added per tile is fused into the
    product: up to 8 % faster than one added after the concatenation, where inputs are few.

    Args:
        layout: Which blocks are stored; row tiles may hold unequal numbers of them, or none.
        values: [blocks, block_out, block_in] in the order of the layout; copied.
        bias: [out_features] or None; copied.
    """

    def __init__(self, layout: BlockLayout, values: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features = layout.in_features
        self.out_features = layout.out_features
        self._group_shape = (-1, layout.column_groups, layout.block_in)
        counts = layout.blocks_per_row_tile.tolist()
        columns, blocks = layout.columns.split(counts), values.detach().split(counts)
        biases = [None] * len(counts) if bias is None else bias.detach().split(layout.block_out)
        self.tiles = nn.ModuleList(map(_Tile, columns, blocks, biases))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features].

        Raises:
            ValueError: The input has another width; a trace learns from this that it is fixed.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected an input [..., {self.in_features}], got {list(map(int, x.shape))}"
            )
        groups = x.contiguous().view(self._group_shape)
        tiles = [tile(groups) for tile in self.tiles]
        result = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)
        # Without a shape to restore, the exported graph has no node for one.
        return result if x.dim() == 2 else result.view(*x.shape[:-1], self.out_features)


class _Tile(nn.Module):
    """The outputs of one row tile."""

    columns: Tensor
    matrix: Tensor
    bias: Tensor | None

    def __init__(self, columns: Tensor, blocks: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        count, block_out, block_in = blocks.shape
        if bias is None and not count:
            bias = blocks.new_zeros(block_out)
        matrix = blocks.transpose(1, 2).reshape(count * block_in, block_out)
        self.register_buffer("columns", columns.clone())
        self.register_buffer("matrix", matrix.clone(memory_format=torch.contiguous_format))
        self.register_buffer("bias", None if bias is None else bias.clone())

    def forward(self, groups: Tensor) -> Tensor:
        """Map the inputs [tokens, column groups, block_in] to [tokens, block_out]."""
        width, block_out = self.matrix.shape
        if self.bias is not None and not width:  # not every runtime multiplies empty matrices
            return self.bias.expand(groups.shape[0], block_out)
        product = groups.index_select(1, self.columns).view(-1, width) @ self.matrix
        return product if self.bias is None else product + self.bias
