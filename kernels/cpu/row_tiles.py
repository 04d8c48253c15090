"""The row tiles of a block-sparse weight, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowTile:
    """One row tile.

    Attributes:
        blocks: Its place among the blocks.
        outputs: Its place among the outputs.
        columns: Its column groups.
    """

    blocks: slice
    outputs: slice
    columns: Tensor


def row_tiles(
    rows: Tensor, columns: Tensor, block_out: int, out_features: int
) -> Iterator[RowTile]:
    """Yield every row tile of a layout, those without blocks too."""
    start = 0
    counts: list[int] = torch.bincount(rows, minlength=out_features // block_out).tolist()
    for tile, count in enumerate(counts):
        blocks = slice(start, start + count)
        yield RowTile(blocks, slice(tile * block_out, (tile + 1) * block_out), columns[blocks])
        start += count
