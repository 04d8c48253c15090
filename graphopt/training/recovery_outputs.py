"""What is compared of a cheap model and its teacher: the outputs that somebody reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.errors import CaptureError, InputError, TrainingError
from graphopt.passes.calibration import bind
from graphopt.passes.drift import Output, compared_outputs, deviation
from graphopt.passes.padding import real_tokens
from graphopt.passes.program import Program
from graphopt.passes.structure import flatten, map_tensors, outside_objects
from graphopt.passes.unread import readable_positions
from graphopt.runtime import installation_of

from .recovery_report import Judgement
from .recovery_sites import squared_error

Batch = Mapping[str, Any]
Score = Any
"""A function of a model that returns a number, higher is better."""

_REFERENCE_BYTES = 2**28
"""Outputs of the teacher to keep for judging; of very large ones, fewer batches count."""


class ReadOutputs:
    """Calls models with batches and tells which of their outputs are read, and where.

    Args:
        student: The cheap model; its plan may say which input marks padding and which outputs
            nobody reads.
        teacher: The dense model. Where padding is, is found in its graph; if it cannot be captured,
            every position counts.
        batch: An example batch.

    Raises:
        InputError: if the teacher does not run on the batch.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> None:
        self._device = next(student.parameters()).device
        with torch.no_grad():
            self.call(teacher, batch)
        self._program = _program(student, teacher, self._placed(batch))

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """Call a model with a batch, on its device.

        Raises:
            InputError: if it does not run.
        """
        try:
            return model(**self._placed(batch))
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{type(model).__name__} does not run on a batch of {', '.join(batch)} ({reason}); "
                "the loader must give what both models were made for"
            ) from error

    def real(self, batch: Batch) -> Tensor | None:
        """Return which tokens of a batch are not padding [batch, token], None if all are."""
        if self._program is None:
            return None
        return real_tokens(self._program, self._placed(batch))

    def observed(self, model: nn.Module, batch: Batch) -> list[Output]:
        """Return what is read of a model's outputs, on the CPU."""
        with torch.no_grad():
            values, structure = flatten(self.call(model, batch))
        return compared_outputs(values, structure, self._readable(batch, len(values)))

    def error(self, student: Any, teacher: Any, batch: Batch) -> Tensor | None:
        """Return the squared relative error of the student's outputs, the mean over the outputs.

        None if no float output depends on trained parameters.

        Args:
            student: What the cheap model returned.
            teacher: What the dense model returned.
            batch: The batch of that call.

        Raises:
            TrainingError: if the outputs do not fit each other.
        """
        (mine, structure), (theirs, _) = flatten(student), flatten(teacher)
        if len(mine) != len(theirs):
            raise TrainingError(
                f"expected as many outputs of the model as of its teacher, got {len(mine)} and "
                f"{len(theirs)}; pass the dense model that it was made from"
            )
        readable = self._readable(batch, len(mine))
        errors = []
        for value, wanted, where, outside in zip(
            mine, theirs, readable, outside_objects(structure), strict=True
        ):
            if not outside or not _is_learned(value):
                continue
            if value.shape != wanted.shape:
                raise TrainingError(
                    f"expected outputs of one shape, got {list(value.shape)} of the model and "
                    f"{list(wanted.shape)} of its teacher; pass the dense model it was made from"
                )
            if where is not None:
                here = where.to(value.device)
                value, wanted = torch.where(here, value, 0), torch.where(here, wanted, 0)
            errors.append(squared_error(value, wanted.detach()))
        return torch.stack(errors).mean() if errors else None

    def _placed(self, batch: Batch) -> dict[str, Any]:
        return {
            name: map_tensors(value, lambda tensor: tensor.to(self._device))
            for name, value in batch.items()
        }

    def _readable(self, batch: Batch, count: int) -> Sequence[Tensor | None]:
        if self._program is None or len(self._program.result.args[0]) != count:  # type: ignore[arg-type]
            return [None] * count
        try:
            return readable_positions(self._program, bind(self._program, batch))
        except InputError:  # another call than the example's
            return [None] * count


@dataclass(frozen=True)
class HeldOut:
    """Batches to judge a model by, with what the teacher makes of them.

    Attributes:
        outputs: How models are called and read.
        references: The batches and the teacher's outputs.
        score: The user's score, None without one.
    """

    outputs: ReadOutputs
    references: tuple[tuple[Batch, list[Output]], ...]
    score: Score

    @classmethod
    def of(
        cls, outputs: ReadOutputs, teacher: nn.Module, batches: Iterable[Batch], score: Score
    ) -> HeldOut:
        """Let the teacher, in evaluation mode, run on batches; as many as fit in memory count."""
        references: list[tuple[Batch, list[Output]]] = []
        kept_bytes = 0
        for batch in batches:
            observed = outputs.observed(teacher, batch)
            kept_bytes += sum(output.value.nbytes for output in observed)
            if references and kept_bytes > _REFERENCE_BYTES:
                break
            references.append((batch, observed))
        return cls(outputs, tuple(references), score)

    def judge(self, model: nn.Module) -> Judgement:
        """Return how far a model, in evaluation mode, is from the teacher."""
        found = deviation(
            (self.outputs.observed(model, batch), reference) for batch, reference in self.references
        )
        with torch.no_grad():
            score = None if self.score is None else float(self.score(model))
        return Judgement(drift=found.drift, cosine=found.cosine, score=score)


def _program(student: nn.Module, teacher: nn.Module, batch: dict[str, Any]) -> Program | None:
    try:
        program = capture(teacher, batch)
    except CaptureError:
        return None
    installation = installation_of(student)
    if installation is not None and installation.program is not None:
        program.padding = installation.program.padding
        program.unread_outputs = installation.program.unread_outputs
    return program


def _is_learned(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() > 0
        and value.requires_grad
    )
