"""How far outputs are from what they were: relative error and cosine, where somebody reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calibration import bind
from .errors import InputError
from .program import Program
from .structure import outside_objects
from .unread import readable_positions
from .verifier import preserved

_CHUNK = 2**22
"""Elements compared at once: their copies in float64 stay small beside any model."""


@dataclass(frozen=True)
class OutputReference:
    """A float output of one batch.

    Attributes:
        value: What the program computed [*, width].
        where: Where it is read, for broadcasting; None for everywhere.
    """

    value: Tensor
    where: Tensor | None


@dataclass(frozen=True)
class BatchReference:
    """One batch and what the program computed for it.

    Attributes:
        inputs: The program's input tensors.
        outputs: Its float outputs that lie outside of plain objects (of caches, for instance).
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[OutputReference, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the outputs."""
        return sum(item.value.nbytes for item in self.outputs)


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


def reference(program: Program, batch: Mapping[str, Any]) -> BatchReference:
    """Return what a program computes for a batch now, in evaluation mode.

    Raises:
        InputError: if the batch does not fit the program.
    """
    inputs = tuple(bind(program, batch))
    try:
        values = evaluated(program, inputs)
        readable = readable_positions(program, inputs)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"a batch with inputs of the sizes {shapes} does not run ({reason}); "
            "pass batches of the form of the example inputs"
        ) from error
    outputs = [
        OutputReference(value.cpu(), None if where is None else where.cpu())
        for value, where, outside in zip(
            values, readable, outside_objects(program.outputs), strict=True
        )
        if outside and is_compared(value)
    ]
    return BatchReference(inputs, tuple(outputs))


def deviation(program: Program, references: Sequence[BatchReference]) -> Deviation:
    """Return how far a program is from what it computed when the references were taken."""
    worst = 0.0
    cosines: dict[int, list[float]] = {}
    for item in references:
        values = evaluated(program, item.inputs)
        compared = [
            value
            for value, outside in zip(values, outside_objects(program.outputs), strict=True)
            if outside and is_compared(value)
        ]
        for index, (value, expected) in enumerate(zip(compared, item.outputs, strict=True)):
            drift, cosine, rows = compare(value.cpu(), expected.value, expected.where)
            worst = max(worst, drift)
            total = cosines.setdefault(index, [0.0, 0])
            total[0] += cosine
            total[1] += rows
    means = [total / rows for total, rows in cosines.values() if rows]
    return Deviation(drift=worst, cosine=min(means, default=1.0))


def evaluated(program: Program, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the outputs of a program in evaluation mode; the model stays as it is."""
    with preserved(program.model), torch.no_grad():
        program.model.eval()
        return program.run(*inputs)


def is_compared(value: Any) -> bool:
    """Say whether an output is one that can drift: a float tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


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
    found = torch.where(lengths > 0, (a * b).sum(1) / lengths.clamp(min=1e-300), 0.0)
    return found.nan_to_num(nan=-1.0).clamp(-1, 1).masked_fill((a == b).all(1), 1.0)
