"""Which blocks of a matrix are stored, and how their values become a matrix and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BlockLayout"]


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The places of the stored blocks of a matrix [out_features, in_features].

    The matrix is cut into row tiles of `block_out` rows and column groups of `block_in` columns.
    Block i stands at row tile `rows[i]` and column group `columns[i]`; blocks are ordered by row
    tile, then by column group (CSR order). Their values are one tensor
    [blocks, block_out, block_in] in the same order.

    Attributes:
        out_features: Rows of the matrix, a multiple of `block_out`.
        in_features: Columns of the matrix, a multiple of `block_in`.
        block_out: Rows of a block.
        block_in: Columns of a block.
        rows: Row tile of every block [blocks], int32.
        columns: Column group of every block [blocks], int32.

    Raises:
        ValueError: The sizes do not divide, or the indices do not name distinct blocks of the
            matrix in CSR order.
    """

    out_features: int
    in_features: int
    block_out: int
    block_in: int
    rows: Tensor
    columns: Tensor

    def __post_init__(self) -> None:
        _check_sizes(self.out_features, self.in_features, self.block_out, self.block_in)
        for name, indices in (("rows", self.rows), ("columns", self.columns)):
            if indices.dim() != 1 or indices.dtype != torch.int32:
                raise ValueError(
                    f"expected {name} as int32 [blocks], got {indices.dtype} {list(indices.shape)}"
                )
        if self.rows.shape != self.columns.shape or not self.rows.numel():
            raise ValueError(
                "expected one row tile and one column group for each of one or more blocks, got "
                f"{self.rows.numel()} and {self.columns.numel()}"
            )
        if not self.rows.is_meta:
            self._check_indices()

    @classmethod
    def from_mask(cls, mask: Tensor, block_out: int, block_in: int) -> BlockLayout:
        """Return the layout of the blocks that a mask [row tiles, column groups] keeps."""
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(
                f"expected a bool mask [row tiles, column groups], got {mask.dtype} "
                f"{list(mask.shape)}"
            )
        rows, columns = mask.nonzero(as_tuple=True)
        sizes = (mask.shape[0] * block_out, mask.shape[1] * block_in)
        return cls(*sizes, block_out, block_in, rows.int(), columns.int())

    @classmethod
    def from_scores(
        cls, scores: Tensor, density: float, block_out: int, block_in: int, *, balanced: bool = True
    ) -> BlockLayout:
        """Keep the blocks with the highest scores; ties keep the first.

        Args:
            scores: [row tiles, column groups]; higher matters more.
            density: Share of the blocks to keep, in (0, 1]; rounded to whole blocks, at least one
                in every row tile (balanced) or in all.
            block_out: Rows of a block.
            block_in: Columns of a block.
            balanced: Keep equally many blocks in every row tile: no tile waits for another, and
                all tiles are one batched product.
        """
        if not 0 < density <= 1:
            raise ValueError(f"expected a density above 0 and at most 1, got {density}")
        if scores.isnan().any():
            raise ValueError("expected scores to rank the blocks by, got NaN")
        ranked = scores if balanced else scores.reshape(1, -1)
        keep = max(1, round(density * ranked.shape[1]))
        order = ranked.sort(dim=1, descending=True, stable=True).indices[:, :keep]
        mask = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, order, True)
        return cls.from_mask(mask.reshape(scores.shape), block_out, block_in)

    @property
    def row_tiles(self) -> int:
        """Number of row tiles."""
        return self.out_features // self.block_out

    @property
    def column_groups(self) -> int:
        """Number of column groups."""
        return self.in_features // self.block_in

    @property
    def blocks(self) -> int:
        """Number of stored blocks."""
        return self.rows.numel()

    @property
    def density(self) -> float:
        """Stored share of the matrix."""
        return self.blocks / (self.row_tiles * self.column_groups)

    @property
    def blocks_per_row_tile(self) -> Tensor:
        """Number of stored blocks in every row tile [row tiles], int64."""
        return torch.bincount(self.rows, minlength=self.row_tiles)

    @property
    def is_balanced(self) -> bool:
        """Whether every row tile stores equally many blocks."""
        counts = self.blocks_per_row_tile
        return bool((counts == counts[0]).all())

    def size_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the stored values and of both int32 indices."""
        return self.blocks * (self.block_out * self.block_in * dtype.itemsize + 2 * 4)

    def mask(self) -> Tensor:
        """Return which blocks are stored [row tiles, column groups], bool."""
        mask = self.rows.new_zeros(self.row_tiles, self.column_groups, dtype=torch.bool)
        mask[self.rows.long(), self.columns.long()] = True
        return mask

    def pack(self, matrix: Tensor) -> Tensor:
        """Return the values of the stored blocks [blocks, block_out, block_in]; exact."""
        if matrix.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"expected a matrix {[self.out_features, self.in_features]}, got "
                f"{list(matrix.shape)}"
            )
        tiled = matrix.reshape(self.row_tiles, self.block_out, self.column_groups, self.block_in)
        return tiled[self.rows.long(), :, self.columns.long()].contiguous()

    def unpack(self, values: Tensor) -> Tensor:
        """Return the matrix [out_features, in_features]: 0 where no block is stored; exact."""
        if values.shape != (self.blocks, self.block_out, self.block_in):
            raise ValueError(
                f"expected values {[self.blocks, self.block_out, self.block_in]}, got "
                f"{list(values.shape)}"
            )
        tiled = values.new_zeros(
            self.row_tiles, self.column_groups, self.block_out, self.block_in
        ).index_put((self.rows.long(), self.columns.long()), values)
        return tiled.transpose(1, 2).reshape(self.out_features, self.in_features)

    def _check_indices(self) -> None:
        for name, indices, limit in (
            ("rows", self.rows, self.row_tiles),
            ("columns", self.columns, self.column_groups),
        ):
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= limit:
                raise ValueError(f"expected {name} from 0 to {limit - 1}, got {low} to {high}")
        places = self.rows.long() * self.column_groups + self.columns.long()
        if bool((places.diff() <= 0).any()):
            raise ValueError(
                "expected distinct blocks, ordered by row tile and then by column group"
            )


def _check_sizes(out_features: int, in_features: int, block_out: int, block_in: int) -> None:
    for what, size, block in (
        ("output", out_features, block_out),
        ("input", in_features, block_in),
    ):
        if block < 1 or size < 1 or size % block:
            raise ValueError(
                f"expected blocks that divide the {what} size {size}, got blocks of {block}; "
                "choose a divisor or leave this layer dense"
            )
