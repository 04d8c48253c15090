"""A table of positions on a grid, as it is for images of another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PositionGrid"]


class PositionGrid(nn.Module):
    """Averages positions [.., before + rows * columns + after, ..] to the grid that patches have.

    For patches on the full grid the table itself is returned. For fewer, each of their positions is
    the mean of those that its area covers, as each pixel of a smaller image is; what stands before
    and after the grid (class tokens) stays. Computed in the table's type; costs two copies of it.
    Source: tables of positions for another resolution, interpolated (ViT, arXiv 2010.11929, 3.2).

    Attributes:
        dim: The table's dimension of positions.
        before: Positions before the grid.
        grid: Rows and columns of the full grid.
        patch_dims: The dimensions of the patches along which rows and columns lie.
    """

    def __init__(
        self, *, dim: int, before: int, grid: tuple[int, int], patch_dims: tuple[int, int]
    ) -> None:
        """Hold the places; there are no parameters and no buffers."""
        super().__init__()
        self.dim = dim
        self.before = before
        self.grid = grid
        self.patch_dims = patch_dims

    def forward(self, table: Tensor, patches: Tensor) -> Tensor:
        """Return the table for as many rows and columns as the patches have."""
        rows, columns = (patches.shape[dim] for dim in self.patch_dims)
        if (rows, columns) == self.grid:
            return table
        count = self.grid[0] * self.grid[1]
        last = table.movedim(self.dim, -1)
        after = last.shape[-1] - self.before - count
        first, middle, rest = last.split([self.before, count, after], -1)
        lying = middle.reshape(1, -1, *self.grid)
        smaller = F.interpolate(lying, (rows, columns), mode="area")
        fitted = smaller.reshape(*middle.shape[:-1], rows * columns)
        return torch.cat([first, fitted, rest], -1).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        """Return the full grid."""
        return f"grid={self.grid}, before={self.before}"
