"""Which blocks of a linear layer's weight stay, and their values: scores, OBS, repair.

The layer is `y = W x + b` with W [outputs, channels], cut into row tiles of `block_out` outputs and
column groups of `block_in` channels; every row tile keeps the same number of blocks. A row tile is
a linear layer of its own that loses column groups, so the closed forms of `least_squares` apply to
it as they are. The module knows no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.kernels import BlockLayout

from .gram import GramAccumulator
from .least_squares import (
    channels_of_groups,
    eliminate_groups,
    fit_linear,
    weigh_outputs,
)


@dataclass(frozen=True, kw_only=True)
class SparseFit:
    """The kept blocks of a layer.

    Attributes:
        layout: Which.
        values: [blocks, block_out, block_in].
        bias: [outputs], None where the layer has none.
        relative_error: Predicted ||error|| / ||outputs - mean|| on the calibration data, None
            without.
    """

    layout: BlockLayout
    values: Tensor
    bias: Tensor | None
    relative_error: float | None


def block_energy(matrix: Tensor, block_out: int, block_in: int) -> Tensor:
    """Return the sum of squares of every block [row tiles, column groups], float64."""
    squares = matrix.double().square()
    tiled = squares.reshape(
        matrix.shape[0] // block_out, block_out, matrix.shape[1] // block_in, block_in
    )
    return tiled.sum((1, 3))


def magnitude_layout(matrix: Tensor, block_out: int, block_in: int, kept: int) -> BlockLayout:
    """Keep the `kept` blocks of largest norm in every row tile."""
    energy = block_energy(matrix, block_out, block_in)
    return BlockLayout.from_scores(energy, kept / energy.shape[1], block_out, block_in)


def obs_layout(
    matrix: Tensor,
    covariance: Tensor,
    block_out: int,
    block_in: int,
    kept: int,
    metric: Tensor | None = None,
) -> BlockLayout:
    """Remove column groups from every row tile one after the other, refitting what is left.

    Structured OBS (`eliminate_groups`) for each row tile by itself.

    Args:
        matrix: W [outputs, channels].
        covariance: Of the inputs [channels, channels].
        block_out: Rows of a block.
        block_in: Columns of a block.
        kept: Blocks per row tile.
        metric: What output errors cost [outputs, outputs] (see `weigh_outputs`); default: all the
            same.
    """
    tiles = matrix.shape[0] // block_out
    groups = matrix.shape[1] // block_in
    mask = torch.zeros(tiles, groups, dtype=torch.bool, device=matrix.device)
    for tile in range(tiles):
        outputs = slice(tile * block_out, (tile + 1) * block_out)
        rows = matrix[outputs]
        if metric is not None:
            rows = weigh_outputs(rows, metric[outputs, outputs])
        mask[tile, eliminate_groups(covariance, rows, kept, group_size=block_in)] = True
    return BlockLayout.from_mask(mask, block_out, block_in)


def kept_as_they_are(
    matrix: Tensor, bias: Tensor | None, layout: BlockLayout, statistics: GramAccumulator | None
) -> SparseFit:
    """Keep the blocks' values; predict the error where there are statistics."""
    values = layout.pack(matrix)
    error = None
    if statistics is not None:
        dense = matrix.to(statistics.covariance)
        lost = dense - layout.unpack(values).to(dense)
        variance = _output_variance(dense, statistics).sum()
        missing = _output_variance(lost, statistics).sum() + (lost @ statistics.mean_x).norm() ** 2
        error = _root(missing, variance)
    return SparseFit(layout=layout, values=values, bias=bias, relative_error=error)


def repaired(
    matrix: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    statistics: GramAccumulator,
    damping: float,
) -> SparseFit:
    """Refit the kept blocks of every row tile by least squares; the bias absorbs means.

    Without a bias the statistics must be uncentered (`GramAccumulator.uncentered`).
    """
    size = layout.block_out
    values = matrix.new_empty(layout.blocks, size, layout.block_in, dtype=torch.float64)
    new_bias = matrix.new_zeros(matrix.shape[0], dtype=torch.float64)
    variances = _output_variance(matrix.to(statistics.covariance), statistics)
    error = variances.new_zeros(())
    for tile in range(layout.row_tiles):
        blocks = (layout.rows == tile).nonzero().squeeze(1)
        outputs = slice(tile * size, (tile + 1) * size)
        channels = channels_of_groups(layout.columns[blocks].long(), layout.block_in)
        fit = fit_linear(
            statistics,
            matrix[outputs],
            None if bias is None else bias[outputs],
            channels.to(matrix.device),
            damping=damping,
        )
        values[blocks] = fit.weight.view(size, -1, layout.block_in).transpose(0, 1)
        new_bias[outputs] = fit.bias
        error += fit.relative_error * variances[outputs].sum()
    return SparseFit(
        layout=layout,
        values=values,
        bias=None if bias is None else new_bias,
        relative_error=_root(error, variances.sum()),
    )


def _output_variance(matrix: Tensor, statistics: GramAccumulator) -> Tensor:
    """Return the variance of every output [outputs]."""
    return (matrix @ statistics.covariance * matrix).sum(1)


def _root(error: Tensor, variance: Tensor) -> float:
    return max(0.0, (error / variance).item()) ** 0.5 if variance > 0 else 0.0
