"""What of a program's outputs nobody reads: positions of padding, and outputs named as unread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .padding import padding_input, real_tokens
from .program import Program, shape_of
from .row_places import row_places


@dataclass(frozen=True)
class OutputRows:
    """The dimensions of an output that count samples and tokens."""

    rank: int
    batch: tuple[int, ...]
    token: tuple[int, ...]
    token_first: bool


def read_part(program: Program, tensors: Sequence[Tensor], outputs: Sequence[Any]) -> list[Any]:
    """Return a call's outputs with zeros where nobody reads them.

    These are the positions of tokens that the padding input marks as padding, samples that are
    padding only, and `program.unread_outputs`.

    Args:
        program: The program; changed or not, its call is the same.
        tensors: The call's input tensors, real ones.
        outputs: What it returned.
    """
    readable = readable_positions(program, tensors)
    return [
        value if where is None else torch.where(where.to(value.device), value, 0)
        for value, where in zip(outputs, readable, strict=True)
    ]


def readable_positions(program: Program, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return, for every output, where it is read, for broadcasting; None for everywhere."""
    rows = output_rows(program)
    real = _real(program, tensors) if any(rows) else None
    result: list[Tensor | None] = []
    for position, found in enumerate(rows):
        if position in program.unread_outputs:
            result.append(torch.tensor(False))
        elif found is None or real is None:
            result.append(None)
        else:
            result.append(_positions(real, found))
    return result


def _real(program: Program, tensors: Sequence[Tensor]) -> Tensor | None:
    """Return which tokens of a call are real [batch, token], None if all are."""
    batch = {node.name: value for node, value in zip(program.placeholders, tensors, strict=True)}
    real = real_tokens(program, batch)
    return None if real is None or bool(real.all()) else real


def _positions(real: Tensor, rows: OutputRows) -> Tensor:
    """Return which elements of an output belong to real tokens, or to samples with such."""

    def at(value: Tensor, *dims: int) -> Tensor:
        shape = [1] * rows.rank
        for dim, size in zip(dims, value.shape, strict=True):
            shape[dim] = size
        return value.reshape(shape)

    merged = set(rows.batch) & set(rows.token)
    found = torch.ones((1,) * rows.rank, dtype=torch.bool, device=real.device)
    for dim in merged:
        found = found & at((real.t() if rows.token_first else real).reshape(-1), dim)
    for dim in (*rows.batch, *rows.token):
        if dim in merged:
            continue
        if dim in rows.batch:
            found = found & at(real.any(1), dim)
        elif not rows.batch:
            found = found & at(real.any(0), dim)
        elif rows.batch[0] < dim:
            found = found & at(real, rows.batch[0], dim)
        else:
            found = found & at(real.t(), dim, rows.batch[0])
    return found


def output_rows(program: Program) -> list[OutputRows | None]:
    """Return where the rows of every output lie, None where it has none in plain places.

    Found once: call it before a change that hides how outputs come from inputs.
    """
    found: list[OutputRows | None] = program.call_fact("rows of the outputs", _output_rows)
    return found


def _output_rows(program: Program) -> list[OutputRows | None]:
    name = padding_input(program)
    places = None if name is None else row_places(program, name)
    result: list[OutputRows | None] = []
    (nodes,) = program.result.args
    assert isinstance(nodes, (tuple, list))
    for node in nodes:
        if places is None or not isinstance(node, fx.Node) or not _is_tensor(node):
            result.append(None)
            continue
        shape, place = shape_of(node), places.place(node)
        batch, token = places.batch_dims(node), places.token_dims(node)
        sizes = dict.fromkeys((*batch, *token), 1)
        for dim in batch:
            sizes[dim] *= places.batch
        for dim in token:
            sizes[dim] *= places.tokens
        plain = bool(sizes) and all(shape[dim] == size for dim, size in sizes.items())
        first = place is not None and place.token_first
        result.append(OutputRows(len(shape), batch, token, first) if plain else None)
    return result


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
