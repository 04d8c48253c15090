"""Some rows of a tensor: taken out, put back, and put back over others.

A token that is computed is a row; which rows are computed is an index of distinct row numbers.
Packing, gates and demand all come down to these three functions. Off CUDA they are plain torch, so
that every exporter and compiler knows them.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["combine_rows", "gather_rows", "scatter_rows"]


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows of this index.

    Cost: one read and one write of the rows; the gradient of the other rows is zero.

    Args:
        x: [rows, ...].
        index: Distinct row numbers [taken], int64.

    Returns:
        [taken, ...].
    """
    return x.index_select(0, index)


def scatter_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Return zeros with these rows in their places; the transpose of `gather_rows`.

    Args:
        rows: [taken, ...].
        index: Distinct row numbers [taken], int64.
        size: Number of rows of the result.

    Returns:
        [size, ...].
    """
    # Adding to zeros is what torch does fastest on a CPU: a third of the time of `index_copy`.
    return rows.new_zeros((size, *rows.shape[1:])).index_add(0, index, rows)


def combine_rows(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return a copy of `base` with these rows in the places of its own.

    Args:
        base: [rows, ...].
        index: Distinct row numbers [taken], int64.
        rows: [taken, ...].

    Returns:
        [rows, ...].
    """
    return base.index_copy(0, index, rows)
