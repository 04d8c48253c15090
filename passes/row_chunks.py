"""A call cut into calls with fewer rows, so that what a program keeps for gradients stays small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor

from .facts import facts_of
from .program import Program, shape_of

_FEWEST_BYTES = 16 * 2**20
"""Room that a model of any size may take, so that small ones do not run row by row."""


def model_room_bytes(program: Program) -> int:
    """Return how much memory work on a model may take beside it: half of its size, about."""
    held = {id(p): p.nbytes for p in (*program.model.parameters(), *program.model.buffers())}
    return max(_FEWEST_BYTES, sum(held.values()) // 2)


def row_chunks(
    program: Program, tensors: Sequence[Tensor], room_bytes: int
) -> Iterator[list[Tensor]]:
    """Yield calls with some rows each, whose activations together take about a given room.

    A call whose batch is not dynamic stays whole.

    Args:
        program: The program.
        tensors: Input tensors in order.
        room_bytes: Room for all values of one call.
    """
    rows = row_count(program, tensors)
    if rows is None:
        yield list(tensors)
        return
    example = sum(prod(shape_of(node)) for node in program.placeholders)
    written = sum(facts.written_bytes for facts in facts_of(program).nodes.values())
    values = sum(tensor.numel() for tensor in tensors)
    row_bytes = written * values / max(example, 1) / max(rows, 1)
    step = max(1, int(room_bytes / max(row_bytes, 1)))
    for start in range(0, rows, step):
        yield first_rows(program, tensors, start, start + step)


def row_count(program: Program, tensors: Sequence[Tensor]) -> int | None:
    """Return how many rows a call has, None if its batch is not dynamic or not one."""
    sizes = {tensors[index].shape[0] for index in _with_rows(program)}
    return sizes.pop() if len(sizes) == 1 else None


def first_rows(program: Program, tensors: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Return a call's tensors with the rows from start to before stop."""
    with_rows = _with_rows(program)
    return [
        tensor[start:stop] if index in with_rows else tensor for index, tensor in enumerate(tensors)
    ]


def _with_rows(program: Program) -> frozenset[int]:
    """Return the positions of the inputs whose first dimension is dynamic."""
    dynamic = program.dynamic_dimensions()
    return frozenset(
        index for index, node in enumerate(program.placeholders) if 0 in dynamic[node.name]
    )
