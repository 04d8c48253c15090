"""Some rows of a tensor: taken out, put back, and put back over others.

A token that is computed is a row; which rows are computed is an index of distinct row numbers.
Packing, gates and demand all come down to these three functions. Off CUDA, and wherever a program
is exported, they are their references in plain torch, which every exporter and compiler knows. On
CUDA devices they are the operators `graphopt::{gather,scatter,combine}_rows`: kernels are imported
at the first call, and each one's gradient is made of the others, so that they can be
differentiated any number of times.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_combine",
    "check_gather",
    "check_scatter",
    "combine_rows",
    "combine_rows_reference",
    "gather_rows",
    "gather_rows_reference",
    "scatter_rows",
    "scatter_rows_reference",
]

_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")
_LIBRARY.define("gather_rows(Tensor x, Tensor index) -> Tensor")
_LIBRARY.define("scatter_rows(Tensor rows, Tensor index, SymInt size) -> Tensor")
_LIBRARY.define("combine_rows(Tensor base, Tensor index, Tensor rows) -> Tensor")
_OPERATORS = torch.ops.graphopt


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows of this index.

    Cost: one read and one write of the rows; the gradient of the other rows is zero.

    Args:
        x: [rows, ...].
        index: Distinct row numbers [taken], int64.

    Returns:
        [taken, ...].
    """
    if not _runs_operators(x):
        return gather_rows_reference(x, index)
    result: Tensor = _OPERATORS.gather_rows.default(x, index)
    return result


def scatter_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Return zeros with these rows in their places; the transpose of `gather_rows`.

    Cost: one read of the rows and one write of the result.

    Args:
        rows: [taken, ...].
        index: Distinct row numbers [taken], int64.
        size: Number of rows of the result.

    Returns:
        [size, ...].
    """
    if not _runs_operators(rows):
        return scatter_rows_reference(rows, index, size)
    result: Tensor = _OPERATORS.scatter_rows.default(rows, index, size)
    return result


def combine_rows(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return a copy of `base` with these rows in the places of its own.

    Cost: one read and one write of the result. The gradient of the replaced rows is zero.

    Args:
        base: [rows, ...].
        index: Distinct row numbers [taken], int64.
        rows: [taken, ...].

    Returns:
        [rows, ...].
    """
    if not _runs_operators(base):
        return combine_rows_reference(base, index, rows)
    result: Tensor = _OPERATORS.combine_rows.default(base, index, rows)
    return result


def gather_rows_reference(x: Tensor, index: Tensor) -> Tensor:
    """Return what `gather_rows` does, in plain torch."""
    return x.index_select(0, index)


def scatter_rows_reference(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Return what `scatter_rows` does, in plain torch."""
    # Adding to zeros is what torch does fastest on a CPU: a third of the time of `index_copy`.
    return rows.new_zeros((size, *rows.shape[1:])).index_add(0, index, rows)


def combine_rows_reference(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return what `combine_rows` does, in plain torch."""
    return base.index_copy(0, index, rows)


def _runs_operators(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_exporting()


def check_gather(x: Tensor, index: Tensor) -> None:
    """Refuse operands that do not fit each other, on any device and in the fake kernel.

    Raises:
        RuntimeError: with what was expected and what came.
    """
    torch._check(
        x.dim() > 0 and index.dim() == 1 and index.dtype == torch.int64,
        lambda: (
            f"expected rows [rows, ...] and their numbers [taken] in int64, got {list(x.shape)} "
            f"and {list(index.shape)} in {index.dtype}"
        ),
    )


def check_scatter(rows: Tensor, index: Tensor) -> None:
    """Refuse operands that do not fit each other, as `check_gather` does."""
    check_gather(rows, index)
    torch._check(
        rows.shape[0] == index.shape[0],
        lambda: (
            f"expected one number for every row, got {index.shape[0]} for {list(rows.shape)} rows"
        ),
    )


def check_combine(base: Tensor, index: Tensor, rows: Tensor) -> None:
    """Refuse operands that do not fit each other, as `check_gather` does."""
    check_scatter(rows, index)
    torch._check(
        base.dim() == rows.dim() and base.dtype == rows.dtype,
        lambda: (
            f"expected rows like those of {list(base.shape)} in {base.dtype}, got "
            f"{list(rows.shape)} in {rows.dtype}"
        ),
    )
    for under, over in zip(base.shape[1:], rows.shape[1:], strict=True):
        torch._check(
            under == over,
            lambda: f"expected rows like those of {list(base.shape)}, got {list(rows.shape)}",
        )


def _gather_shape(x: Tensor, index: Tensor) -> Tensor:
    check_gather(x, index)
    return x.new_empty((index.shape[0], *x.shape[1:]))


def _scatter_shape(rows: Tensor, index: Tensor, size: int) -> Tensor:
    check_scatter(rows, index)
    return rows.new_empty((size, *rows.shape[1:]))


def _combine_shape(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    check_combine(base, index, rows)
    return base.new_empty(base.shape)


def _gather_on_cpu(x: Tensor, index: Tensor) -> Tensor:
    check_gather(x, index)
    return gather_rows_reference(x, index)


def _scatter_on_cpu(rows: Tensor, index: Tensor, size: int) -> Tensor:
    check_scatter(rows, index)
    return scatter_rows_reference(rows, index, size)


def _combine_on_cpu(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    check_combine(base, index, rows)
    return combine_rows_reference(base, index, rows)


def _on_cuda(name: str) -> Any:
    """Return a kernel that imports its module when it is called first."""

    def kernel(*args: Any) -> Tensor:
        module = importlib.import_module(".gpu.row_dispatch", __package__)
        result: Tensor = getattr(module, name)(*args)
        return result

    return kernel


def _keep_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.size = x.shape[0]


def _gather_gradient(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (index,) = context.saved_tensors
    return _OPERATORS.scatter_rows(gradient, index, context.size), None


def _keep_index(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _scatter_gradient(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (index,) = context.saved_tensors
    return _OPERATORS.gather_rows(gradient, index), None, None


def _combine_gradient(context: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    (index,) = context.saved_tensors
    for_base = for_rows = None
    if context.needs_input_grad[0]:
        # One row of zeros stands for all of them.
        zeros = gradient.new_zeros((1, *gradient.shape[1:])).expand(
            index.shape[0], *gradient.shape[1:]
        )
        for_base = _OPERATORS.combine_rows(gradient, index, zeros)
    if context.needs_input_grad[2]:
        for_rows = _OPERATORS.gather_rows(gradient, index)
    return for_base, None, for_rows


for _name, _fake, _cpu, _keep, _gradient in (
    ("gather_rows", _gather_shape, _gather_on_cpu, _keep_gather, _gather_gradient),
    ("scatter_rows", _scatter_shape, _scatter_on_cpu, _keep_index, _scatter_gradient),
    ("combine_rows", _combine_shape, _combine_on_cpu, _keep_index, _combine_gradient),
):
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"graphopt::{_name}", _gradient, setup_context=_keep, lib=_LIBRARY
    )
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _on_cuda(_name), "CUDA")
