"""What the inputs of a layer are like, for rounding them: ranges, and the noise that it makes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphopt.kernels.quantized_inputs import range_code
from graphopt.passes.calibration import Calibration, bind, evaluation_mode
from graphopt.passes.errors import InputError
from graphopt.passes.padding import real_tokens
from graphopt.passes.program import Program, compile_values
from graphopt.passes.row_chunks import model_room_bytes, row_chunks

_ROWS_KEPT = 256
_SHRINKS = torch.linspace(1.0, 0.3, 36).tolist()


@dataclass(frozen=True)
class InputSurvey:
    """Inputs of a layer on calibration data.

    Attributes:
        rows: Some of them [rows, channels], evenly spaced.
        low: Smallest value of every channel [channels].
        high: Largest value of every channel [channels].
    """

    rows: Tensor
    low: Tensor
    high: Tensor

    @property
    def largest(self) -> Tensor:
        """Largest absolute value of every channel [channels]."""
        return torch.maximum(self.high, -self.low)

    def divided(self, factors: Tensor) -> InputSurvey:
        """Return the survey of inputs divided by positive factors [channels]."""
        factors = factors.to(self.rows)
        return replace(
            self, rows=self.rows / factors, low=self.low / factors, high=self.high / factors
        )

    def clipped_range(self) -> tuple[float, float]:
        """Return the range for static inputs that errs least in mean squares."""
        low, high = self.low.min(), self.high.max()
        errors = [self._static_noise(low * s, high * s) for s in _SHRINKS]
        shrink = _SHRINKS[errors.index(min(errors))]
        return float(low * shrink), float(high * shrink)

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
            return self._static_noise(*map(torch.tensor, self.clipped_range()))
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


def survey(program: Program, calibration: Calibration, source: fx.Node) -> InputSurvey:
    """Return what the values of a node are like, by its last dimension; padding is left out.

    Cost: one pass over the calibration data, up to the node.

    Raises:
        InputError: if there is no batch.
    """
    run = compile_values(program, [source])
    kept: list[Tensor] = []
    low = high = torch.empty(0)
    room = model_room_bytes(program) // 2
    with evaluation_mode(program.model), torch.no_grad():
        for batch in calibration.batches():
            mask = real_tokens(program, batch)
            seen = 0
            for tensors in row_chunks(program, bind(program, batch), room):
                (value,) = run(program.model, *tensors)
                part = None if mask is None else mask[seen : seen + len(value)]
                seen += len(value)
                if part is not None and part.shape == value.shape[:-1]:
                    value = value[part.to(value.device)]
                rows = value.reshape(-1, value.shape[-1]).float()
                if not len(rows):
                    continue
                smallest, largest = torch.aminmax(rows, dim=0)
                low = torch.minimum(low, smallest) if len(low) else smallest
                high = torch.maximum(high, largest) if len(high) else largest
                kept.append(rows[:: -(-len(rows) // _ROWS_KEPT)])
    if not kept:
        raise InputError("the calibration data holds no batch; pass at least one")
    rows = torch.cat(kept)
    return InputSurvey(rows[:: -(-len(rows) // (8 * _ROWS_KEPT))], low, high)
