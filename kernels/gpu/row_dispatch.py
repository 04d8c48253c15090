"""The operators over rows on CUDA devices: choose the Triton kernel or the torch form, call.

A kernel runs where triton is installed and its self-test passed: a kernel's first call on a device
is a check against the torch form, to the last bit. The torch form runs everywhere else.
"""

from __future__ import annotations

import math
import warnings
from functools import cache

import torch
from torch import Tensor

from graphopt.kernels.token_rows import (
    check_combine,
    check_gather,
    check_scatter,
    combine_rows_reference,
    gather_rows_reference,
    scatter_rows_reference,
)

from .triton_package import triton_is_installed

__all__ = ["combine_rows", "gather_rows", "scatter_rows", "works"]

_TEST_ROWS = 5
_TEST_INDEX = (3, 0, 4)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows [taken, ...] of x with these numbers."""
    check_gather(x, index)
    if not _takes(x):
        return gather_rows_reference(x, index)
    from . import row_launch

    return row_launch.gather(x, index)


def scatter_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Return zeros [size, ...] with these rows in their places."""
    check_scatter(rows, index)
    if not _takes(rows):
        return scatter_rows_reference(rows, index, size)
    from . import row_launch

    return row_launch.combine(None, index, rows, size)


def combine_rows(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return a copy of `base` with these rows in the places of its own."""
    check_combine(base, index, rows)
    if not _takes(base):
        return combine_rows_reference(base, index, rows)
    from . import row_launch

    return row_launch.combine(base, index, rows, base.shape[0])


def _takes(x: Tensor) -> bool:
    if x.is_complex() or torch.version.hip is not None or not triton_is_installed():
        return False
    from .row_launch import row_tile

    width = math.prod(x.shape[1:])
    return works(x.element_size(), row_tile(width, x.element_size()).columns, x.device)


@cache
def works(item_bytes: int, columns: int, device: torch.device) -> bool:
    """Return whether the kernels move rows right on a device; test them at the first call.

    Args:
        item_bytes: Size of an element.
        columns: Columns of the tile: what other tests of this device did not compile.
        device: Where they run.

    Raises:
        RuntimeError: A CUDA graph is being captured; the test cannot be part of it.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "expected rows of tokens to have been moved once before a CUDA graph is captured: the "
            "first call on a device compiles and tests a kernel; run the model once, then capture"
        )
    try:
        with torch.inference_mode(False), torch.no_grad():
            reason = "" if _moves_rows(item_bytes, columns, device) else "it moved rows elsewhere"
    except Exception as error:  # A compiler or driver may raise anything; the torch form remains.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if reason:
        warnings.warn(
            f"the Triton kernels that move rows (elements of {item_bytes} bytes, tiles of "
            f"{columns} columns) failed their self-test on {device}, so torch moves them: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not reason


def _moves_rows(item_bytes: int, columns: int, device: torch.device) -> bool:
    """Compare the kernels with the torch forms, on rows that fill their tile and on narrower."""
    from . import row_launch

    index = torch.tensor(_TEST_INDEX, device=device)
    for width in {columns, max(columns - 1, 1)}:
        count = _TEST_ROWS * width * item_bytes
        octets = torch.arange(count, device=device).remainder(251).to(torch.uint8)
        x = octets.view(row_launch.ITEM_TYPES[item_bytes]).view(_TEST_ROWS, width)
        taken = row_launch.gather(x, index)
        zeros = row_launch.combine(None, index, taken, _TEST_ROWS)
        over = row_launch.combine(x, index, -taken, _TEST_ROWS)
        right = (
            torch.equal(taken, gather_rows_reference(x, index)),
            torch.equal(zeros, scatter_rows_reference(taken, index, _TEST_ROWS)),
            torch.equal(over, combine_rows_reference(x, index, -taken)),
        )
        if not all(right):
            return False
    return True
