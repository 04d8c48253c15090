"""How far outputs are from what they were: relative error and cosine, where somebody reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calibration import bind
from .errors import InputError
from .program import Program
from .structure import Structure, outside_objects
from .unread import readable_positions
from .verifier import preserved

_CHUNK = 2**22
"""Elements compared at once: their copies in float64 stay small beside any model."""


@dataclass(frozen=True)
class Output:
    """A float output of one batch.

    Attributes:
        value: What was computed [*, width].
        where: Where it is read, for broadcasting; None for everywhere.
    """

    value: Tensor
    where: Tensor | None = None


@dataclass(frozen=True)
class Deviation:
    """How far a program is from its references.

    Attributes:
        drift: ||out' - out|| / ||out|| over what is read, in the worst batch and output.
        cosine: Mean cosine of the rows (last dimension) of an output over all batches, in the worst
            output; 1 where no output has rows.
    """

    drift: float
    cosine: float


def observed_outputs(program: Program, batch: Mapping[str, Any]) -> list[Output]:
    """Return the outputs of a program in evaluation mode; the model stays as it is.

    Raises:
        InputError: if the batch does not fit the program.
    """
    inputs = bind(program, batch)
    try:
        with preserved(program.model), torch.no_grad():
            program.model.eval()
            values = program.run(*inputs)
        readable = readable_positions(program, inputs)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"a batch with inputs of the sizes {shapes} does not run ({reason}); "
            "pass batches of the form of the example inputs"
        ) from error
    return compared_outputs(values, program.outputs, readable)


def compared_outputs(
    values: Sequence[Any], structure: Structure, readable: Sequence[Tensor | None] | None = None
) -> list[Output]:
    """Return, on the CPU, the float tensors among a call's results that lie outside of caches.

    Args:
        values: The flat results.
        structure: Their structure.
        readable: Where each is read, None for everywhere.
    """
    places = [None] * len(values) if readable is None else readable
    return [
        Output(value.detach().cpu(), None if where is None else where.cpu())
        for value, where, outside in zip(values, places, outside_objects(structure), strict=True)
        if outside and isinstance(value, Tensor) and value.is_floating_point()
    ]


def deviation(pairs: Iterable[tuple[Sequence[Output], Sequence[Output]]]) -> Deviation:
    """Return how far outputs are from what they were.

    Args:
        pairs: For each batch, the outputs now and the outputs before.
    """
    worst = 0.0
    cosines: dict[int, tuple[float, int]] = {}
    for values, references in pairs:
        for index, (value, before) in enumerate(zip(values, references, strict=True)):
            drift, cosine, rows = compare(value.value, before.value, before.where)
            worst = max(worst, drift)
            total, count = cosines.get(index, (0.0, 0))
            cosines[index] = (total + cosine, count + rows)
    means = [total / count for total, count in cosines.values() if count]
    return Deviation(drift=worst, cosine=min(means, default=1.0))


def compare(value: Tensor, expected: Tensor, where: Tensor | None) -> tuple[float, float, int]:
    """Return relative error, sum of the rows' cosines, and number of rows, in float64.

    Values that are not finite must be the same in both, else the error is infinite. Two rows of
    zeros have the cosine 1; numbers without dimensions are no rows.

    Args:
        value: The output [*, width].
        expected: What it was [*, width].
        where: Where it is read, for broadcasting; None for everywhere.
    """
    width = expected.shape[-1] if expected.dim() else 1
    rows = expected.numel() // max(width, 1)
    if value.shape != expected.shape:
        return math.inf, -float(rows), rows
    if rows == 0:
        return 0.0, 0.0, 0
    new, old = value.reshape(rows, width), expected.reshape(rows, width)
    read = None if where is None else where.expand(expected.shape).reshape(rows, width)
    difference = norm = cosine = 0.0
    counted = 0
    step = max(_CHUNK // width, 1)
    for start in range(0, rows, step):
        a, b = new[start : start + step].double(), old[start : start + step].double()
        if read is not None:
            part = read[start : start + step]
            a, b = a.where(part, 0.0), b.where(part, 0.0)
            kept = part.any(1)
        else:
            kept = torch.ones(len(a), dtype=torch.bool)
        odd = ~torch.isfinite(b)
        if not torch.allclose(a[odd], b[odd], rtol=0.0, atol=0.0, equal_nan=True):
            return math.inf, -float(rows), rows
        a, b = a.masked_fill(odd, 0.0), b.masked_fill(odd, 0.0)
        difference += (a - b).square().sum().item()
        norm += b.square().sum().item()
        cosine += _cosines(a[kept], b[kept]).sum().item()
        counted += int(kept.sum())
    error = math.sqrt(difference / norm) if norm else math.sqrt(difference)
    error = math.inf if math.isnan(error) else error
    return error, cosine if expected.dim() else 0.0, counted if expected.dim() else 0


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each pair of rows: 1 for equal ones, -1 where one is not finite."""
    lengths = a.norm(dim=1) * b.norm(dim=1)
    found = torch.where(lengths == 0, 0.0, (a * b).sum(1) / lengths)
    return found.nan_to_num(nan=-1.0).clamp(-1, 1).masked_fill((a == b).all(1), 1.0)
