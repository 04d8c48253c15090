"""Calls of the Triton kernels over rows: which tiles, how many programs run.

Whether to call them at all is decided in `row_dispatch`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import token_rows

__all__ = ["ITEM_TYPES", "WARPS", "RowTile", "combine", "gather", "row_tile"]

# By element size in bytes.
ITEM_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TILE_BYTES = 8192
WARPS = 4


@dataclass(frozen=True)
class RowTile:
    """What one program moves: ROWS rows of COLUMNS elements."""

    rows: int
    columns: int


def row_tile(width: int, item_bytes: int) -> RowTile:
    """Return the tile for rows of `width` elements: 8 KiB, of as few rows as that takes."""
    elements = _TILE_BYTES // item_bytes
    columns: int = min(triton.next_power_of_2(max(width, 1)), elements)
    return RowTile(elements // columns, columns)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows [taken, ...] of x [rows, ...] with these numbers [taken], int64."""
    result = x.new_empty((index.shape[0], *x.shape[1:]))
    if result.numel():
        source, target = _as_integers(x), _as_integers(result)
        taken, width = target.shape
        tile = row_tile(width, x.element_size())
        grid = (triton.cdiv(taken, tile.rows), triton.cdiv(width, tile.columns))
        with _current(x.device):
            token_rows.gather[grid](
                source,
                index.contiguous(),
                target,
                source.shape[0],
                taken,
                width,
                source.stride(0),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                num_warps=WARPS,
            )
    return result


def combine(base: Tensor | None, index: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return [size, ...]: `rows` in the places `index`, elsewhere `base`, or zeros without one."""
    result = rows.new_empty((size, *rows.shape[1:]))
    if result.numel():
        new, target = _as_integers(rows), _as_integers(result)
        # Without a base any pointer will do: it is never read.
        under = target if base is None else _as_integers(base)
        width, taken = target.shape[1], index.shape[0]
        tile = row_tile(width, rows.element_size())
        grid = (triton.cdiv(size, tile.rows), triton.cdiv(width, tile.columns))
        slots = index.new_full((size,), -1, dtype=torch.int32)
        block = row_tile(1, 8).rows
        with _current(rows.device):
            if taken:
                token_rows.number_rows[(triton.cdiv(taken, block),)](
                    index.contiguous(), slots, size, taken, ROWS=block, num_warps=WARPS
                )
            token_rows.combine[grid](
                under,
                new,
                slots,
                target,
                size,
                width,
                under.stride(0),
                new.stride(0),
                HAS_BASE=base is not None,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                num_warps=WARPS,
            )
    return result


def _as_integers(x: Tensor) -> Tensor:
    """Return x as [rows, width] of integers, its memory where the elements of a row lie together.

    Rows may lie apart or on each other (an expanded gradient): the kernels know their distance.
    """
    flat = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    if flat.shape[1] > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat.view(ITEM_TYPES[x.element_size()])


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the operands' device current: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
