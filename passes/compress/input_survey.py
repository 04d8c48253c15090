"""What the inputs of a layer are like, for rounding them: ranges, and the noise that it makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphopt.kernels.quantized_inputs import range_code
from graphopt.passes.calibration import Calibration, bind, evaluation_mode
from graphopt.passes.errors import InputError
from graphopt.passes.gram import GramAccumulator
from graphopt.passes.padding import real_tokens
from graphopt.passes.program import Program, compile_values
from graphopt.passes.row_chunks import model_room_bytes, row_chunks

_ROWS_KEPT = 512
_ROWS_PER_CALL = 16384


@dataclass(frozen=True)
class InputSurvey:
    """Inputs of a layer on calibration data.

    Attributes:
        gram: Their second moments.
        rows: Some of them [rows, channels], evenly spaced.
        low: Smallest value of every channel [channels].
        high: Largest value of every channel [channels].
    """

    gram: GramAccumulator
    rows: Tensor
    low: Tensor
    high: Tensor

    @property
    def largest(self) -> Tensor:
        """Largest absolute value of every channel [channels]."""
        return torch.maximum(self.high, -self.low)

    def divided(self, factors: Tensor) -> InputSurvey:
        """Return the ranges of inputs divided by positive factors [channels]."""
        factors = factors.to(self.rows)
        return replace(
            self,
            rows=self.rows / factors,
            low=self.low / factors,
            high=self.high / factors,
        )

    def range(self) -> tuple[float, float]:
        """Return the range for static inputs: all that was seen.

        Outliers matter more than their number says: cut off where the mean square error is
        smallest, MiniLM's embeddings lose twice as much (mean cosine 0.988, all covered 0.993).
        """
        return float(self.low.min()), float(self.high.max())

    def noise(self, activations: str, groups: int = 1) -> float:
        """Return the mean squared error of rounding an input.

        An error is uniform within a step.

        Args:
            activations: How inputs are rounded (`kernels.quantized_inputs.ACTIVATIONS`).
            groups: Groups of channels with their own scale.
        """
        if activations == "none":
            return 0.0
        if activations == "static":
            return self._static_noise(*map(torch.tensor, self.range()))
        if activations == "dynamic-tensor":
            return (
                float((self.high.max().clamp_min(0) - self.low.min().clamp_max(0)) / 255) ** 2 / 12
            )
        largest = self.rows.unflatten(1, (groups, -1)).abs().amax(2)
        return float((largest / 127).square().mean()) / 12

    def _static_noise(self, low: Tensor, high: Tensor) -> float:
        scale, zero_point = range_code(low, high)
        rounded = (self.rows / scale).round_().add_(zero_point).clamp_(0, 255)
        return float(rounded.sub_(zero_point).mul_(scale).sub_(self.rows).square_().mean())


def survey(program: Program, calibration: Calibration, sources: Sequence[fx.Node]) -> InputSurvey:
    """Return what the values of some nodes are like, by their last dimension, without padding.

    The latest survey is kept: a layer's candidates share it.
    Cost: one pass over the calibration data, up to the last node.

    Raises:
        InputError: if there is no batch.
    """
    held: dict[str, InputSurvey] = program.fact("latest survey of inputs", lambda _: {})
    key = f"{id(calibration)} {' '.join(source.name for source in sources)}"
    if key not in held:
        held.clear()
        held[key] = _survey(program, calibration, sources)
    return held[key]


def _survey(program: Program, calibration: Calibration, sources: Sequence[fx.Node]) -> InputSurvey:
    gram: GramAccumulator | None = None
    kept: list[Tensor] = []
    bounds: list[tuple[Tensor, Tensor]] = []
    for rows in _batches_of_rows(program, calibration, sources):
        gram = gram or GramAccumulator(rows.shape[1], device=rows.device)
        gram.update(_thinned(rows, _ROWS_PER_CALL))
        bounds.append(torch.aminmax(rows, dim=0))
        kept.append(_thinned(rows, _ROWS_KEPT).clone())
    if gram is None:
        raise InputError("the calibration data holds no batch; pass at least one")
    low = torch.stack([smallest for smallest, _ in bounds]).amin(0)
    high = torch.stack([largest for _, largest in bounds]).amax(0)
    return InputSurvey(gram, _thinned(torch.cat(kept), _ROWS_KEPT), low, high)


def _batches_of_rows(
    program: Program, calibration: Calibration, sources: Sequence[fx.Node]
) -> Iterator[Tensor]:
    """Yield the values of some nodes as rows [rows, channels], without padding."""
    run = compile_values(program, sources)
    room = model_room_bytes(program) // 2
    for batch in calibration.batches():
        mask = real_tokens(program, batch)
        seen = 0
        for tensors in row_chunks(program, bind(program, batch), room):
            with evaluation_mode(program.model), torch.no_grad():
                values = run(program.model, *tensors)
            for value in values:
                part = None if mask is None else mask[seen : seen + len(value)]
                if part is not None and part.shape == value.shape[:-1]:
                    value = value[part.to(value.device)]
                rows = value.reshape(-1, value.shape[-1]).float()
                if len(rows):
                    yield rows
            seen += len(values[0])


def _thinned(rows: Tensor, most: int) -> Tensor:
    """Return evenly spaced rows, not many more than a number."""
    return rows[:: max(1, len(rows) // most)]
