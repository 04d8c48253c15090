"""The Triton kernels that take rows out of a tensor and put them back; `row_launch` calls them.

Rows are moved, not computed with, so the kernels see integers of the elements' size: one kernel
serves all types, and every bit arrives (NaN too, and bfloat16 in the interpreter).

Row numbers outside the tensor are neither read nor written: such rows come back as zeros.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size", "taken"])
def gather(
    x,
    index,
    result,
    size,
    taken,
    width,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write result [taken, width] = x[index], x [size, width]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < taken)[:, None] & (column < width)[None, :]
    source = tl.load(index + row, mask=row < taken, other=-1)
    inside = (source >= 0) & (source < size)
    at = x + source[:, None] * x_stride + column[None, :]
    values = tl.load(at, mask=live & inside[:, None], other=0)
    tl.store(result + row[:, None] * width + column[None, :], values, mask=live)


@triton.jit(do_not_specialize=["size", "taken"])
def number_rows(index, slots, size, taken, ROWS: tl.constexpr):
    """Write slots[index[i]] = i, slots [size]."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index + place, mask=place < taken, other=-1)
    tl.store(slots + row, place.to(tl.int32), mask=(row >= 0) & (row < size))


@triton.jit(do_not_specialize=["size"])
def combine(
    base,
    rows,
    slots,
    result,
    size,
    width,
    base_stride,
    rows_stride,
    HAS_BASE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write result [size, width]: row slots[i] of `rows`, or where that is -1 of `base` or 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < size)[:, None] & (column < width)[None, :]
    slot = tl.load(slots + row, mask=row < size, other=-1).to(tl.int64)
    new = (slot >= 0)[:, None]
    at = rows + slot[:, None] * rows_stride + column[None, :]
    values = tl.load(at, mask=live & new, other=0)
    if HAS_BASE:
        under = base + row[:, None] * base_stride + column[None, :]
        values = tl.where(new, values, tl.load(under, mask=live & (slot < 0)[:, None], other=0))
    tl.store(result + row[:, None] * width + column[None, :], values, mask=live)
