"""The tables the kernels walk, derived from the block indices: made at first use, never saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.kernels.block_layout import BlockLayout

from .derived import Derived

__all__ = ["Slots", "Steps", "block_layout", "forward_steps", "gradient_slots", "transposed_steps"]


@dataclass(frozen=True)
class Steps:
    """For every output tile, the K-steps of its product; all tensors int32.

    Attributes:
        starts: First step of every tile, and the end of the last [tiles + 1].
        order: Tiles in launch order, most steps first [tiles].
        dense: Column of the dense operand where each step starts [steps + 1].
        values: Element of the values where each step starts [steps + 1].
        tiles: Number of output tiles.
        longest: Most steps of a tile.
    """

    starts: Tensor
    order: Tensor
    dense: Tensor
    values: Tensor
    tiles: int
    longest: int


@dataclass(frozen=True)
class Slots:
    """For every program of the weight gradient, the parts of blocks it computes; all int32.

    Attributes:
        gradient_columns: First column of the output gradient [groups].
        x_columns: First column of x of each slot [groups, slots].
        places: Element of the values where each slot's part starts, or -1 [groups, slots].
    """

    gradient_columns: Tensor
    x_columns: Tensor
    places: Tensor


_layouts: Derived[BlockLayout] = Derived()
_steps: Derived[Steps] = Derived()
_slots: Derived[Slots] = Derived()


def block_layout(
    rows: Tensor, columns: Tensor, out_features: int, in_features: int, block: tuple[int, int]
) -> BlockLayout:
    """Return the checked layout of the indices, with the indices on the CPU.

    Raises:
        ValueError: The indices name no layout, or its values are too many for int32 places.
    """

    def compute() -> BlockLayout:
        values = rows.numel() * block[0] * block[1]
        if values >= 2**31:
            raise ValueError(
                f"expected fewer than {2**31} stored values in one weight, got {values}: the "
                "kernels count them in int32; split the layer along its outputs"
            )
        # Copies: what is kept must not keep the indices it was derived from alive.
        on_cpu = (indices.to("cpu", copy=True) for indices in (rows, columns))
        return BlockLayout(out_features, in_features, *block, *on_cpu)

    return _layouts.get((rows, columns), (out_features, in_features, block), compute)


def forward_steps(
    rows: Tensor, columns: Tensor, layout: BlockLayout, width: int, step: int
) -> Steps:
    """Return the steps of `x W^T`: tiles of `width` outputs, steps of `step` inputs."""
    return _steps.get(
        (rows, columns),
        (False, width, step, layout.block_out, layout.block_in),
        lambda: _build_steps(layout, width, step, rows.device, transposed=False),
    )


def transposed_steps(
    rows: Tensor, columns: Tensor, layout: BlockLayout, width: int, step: int
) -> Steps:
    """Return the steps of `gradient W`: tiles of `width` inputs, steps of `step` outputs."""
    return _steps.get(
        (rows, columns),
        (True, width, step, layout.block_out, layout.block_in),
        lambda: _build_steps(layout, width, step, rows.device, transposed=True),
    )


def gradient_slots(
    rows: Tensor, columns: Tensor, layout: BlockLayout, height: int, span: int
) -> Slots:
    """Return the parts of blocks to compute together: `height` rows, up to `span` columns.

    Blocks of one row tile share the gradient's columns; narrow ones are computed together.
    """
    return _slots.get(
        (rows, columns),
        (height, span, layout.block_out, layout.block_in),
        lambda: _build_slots(layout, height, span, rows.device),
    )


def _build_steps(
    layout: BlockLayout, width: int, step: int, device: torch.device, *, transposed: bool
) -> Steps:
    rows, columns = layout.rows.long(), layout.columns.long()
    bigger = layout.block_out * layout.block_in
    if transposed:
        outer, inner, tiles, groups = columns, rows, layout.column_groups, layout.row_tiles
        sizes, strides = (layout.block_in, layout.block_out), (1, layout.block_in)
    else:
        outer, inner, tiles, groups = rows, columns, layout.row_tiles, layout.column_groups
        sizes, strides = (layout.block_out, layout.block_in), (layout.block_in, 1)
    parts, steps = sizes[0] // width, sizes[1] // step
    block = torch.argsort(outer * groups + inner)
    shape = (layout.blocks, parts, steps)
    part, inside = torch.arange(parts)[:, None], torch.arange(steps)
    tile = (outer[block][:, None, None] * parts + part).expand(shape).flatten()
    dense = (inner[block][:, None, None] * sizes[1] + inside * step).expand(shape).flatten()
    place = part * width * strides[0] + inside * step * strides[1]
    values = (block[:, None, None] * bigger + place).flatten()
    order = torch.argsort(tile, stable=True)
    lengths = torch.bincount(tile, minlength=tiles * parts)
    return Steps(
        starts=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(device),
        order=torch.argsort(lengths, descending=True, stable=True).int().to(device),
        dense=_padded(dense[order], device),
        values=_padded(values[order], device),
        tiles=tiles * parts,
        longest=int(lengths.max()),
    )


def _build_slots(layout: BlockLayout, height: int, span: int, device: torch.device) -> Slots:
    rows, columns = layout.rows.long(), layout.columns.long()
    width = min(layout.block_in, span)
    slots, parts = span // width, layout.block_in // width
    # All parts of a row tile's blocks side by side, cut into groups of `slots`.
    tile = rows[:, None].expand(-1, parts).flatten()
    inside = torch.arange(parts) * width
    column = (columns[:, None] * layout.block_in + inside).flatten()
    start = torch.arange(layout.blocks)[:, None] * (layout.block_out * layout.block_in)
    place = (start + inside).flatten()
    counts = torch.bincount(tile, minlength=layout.row_tiles)
    in_tile = torch.arange(tile.numel()) - (counts.cumsum(0) - counts)[tile]
    groups = (counts + slots - 1) // slots
    group = (groups.cumsum(0) - groups)[tile] + in_tile // slots
    slot = in_tile % slots
    x_columns = torch.zeros(int(groups.sum()), slots, dtype=torch.long)
    x_columns[group, slot] = column
    places = torch.full_like(x_columns, -1)
    places[group, slot] = place
    # Every group once for each part of the block's rows.
    tops = torch.arange(layout.block_out // height) * height
    first = torch.arange(layout.row_tiles).repeat_interleave(groups) * layout.block_out
    down = tops[:, None, None] * layout.block_in
    places = torch.where(places >= 0, places + down, -1).view(-1, slots)
    return Slots(
        gradient_columns=(first + tops[:, None]).flatten().int().to(device),
        x_columns=x_columns.repeat(len(tops), 1).int().to(device),
        places=places.int().to(device),
    )


def _padded(entries: Tensor, device: torch.device) -> Tensor:
    """Return the entries as int32 and one more: the kernels read one step ahead."""
    return torch.cat([entries, entries.new_zeros(1)]).int().to(device)
