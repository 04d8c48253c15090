"""Streamed second-moment statistics of a layer's inputs and of the outputs it should produce."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["GramAccumulator"]

_SUMS = ("total", "sum_x", "sum_y", "sum_xx", "sum_xy", "sum_yy")

_CONSTANT = 2.0**-40
"""Variance, as a share of the second moment, up to which a channel is taken for constant."""


class GramAccumulator:
    """Sums `X^T X`, `X^T Y`, `Y^2` and the means of rows `X` and targets `Y`, batch by batch.

    Least squares, OBS scores and whitened factorization need nothing else of the calibration
    data, so memory does not grow with it: `8 * channels * (channels + outputs)` bytes.
    Every product is formed and summed in float64. Statistics do not depend on how the rows were
    split into batches, up to float64 rounding. Rows may carry weights: 0 for padding, more for
    rows whose error matters more to the model's output.

    Args:
        channels: Number of input channels of the layer.
        outputs: Number of target columns; 0 where only the inputs are needed.
        device: Where the sums live and the products run.

    Attributes:
        count: Number of rows seen, without those of weight 0.
    """

    def __init__(
        self, channels: int, outputs: int = 0, *, device: torch.device | str | None = None
    ) -> None:
        """Start with empty sums."""
        if channels < 1 or outputs < 0:
            raise ValueError(
                f"expected channels >= 1 and outputs >= 0, got {channels} and {outputs}"
            )
        self.count = 0
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._sum_x = torch.zeros(channels, dtype=torch.float64, device=device)
        self._sum_y = torch.zeros(outputs, dtype=torch.float64, device=device)
        self._sum_xx = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self._sum_xy = torch.zeros(channels, outputs, dtype=torch.float64, device=device)
        self._sum_yy = torch.zeros(outputs, dtype=torch.float64, device=device)

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return self._sum_x.numel()

    @property
    def outputs(self) -> int:
        """Number of target columns."""
        return self._sum_y.numel()

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add rows.

        Cost: `rows * channels * (channels + outputs)` multiply-adds in float64.

        Args:
            x: Inputs [..., channels].
            y: Targets [..., outputs], the leading dimensions of `x`; needed iff `outputs > 0`.
            weights: Of the rows [...], not negative, or a mask that is true for real tokens; rows
                of weight 0 are not read at all. Default: 1 for all.

        Raises:
            ValueError: A shape does not fit, a weight is negative, or a value that counts is not
                finite; the sums are then unchanged.
        """
        rows = x.shape[:-1]
        if x.ndim < 1 or x.shape[-1] != self.channels:
            raise ValueError(f"expected inputs [..., {self.channels}], got {list(x.shape)}")
        if (y is None) != (self.outputs == 0) or (
            y is not None and y.shape != (*rows, self.outputs)
        ):
            got = "none" if y is None else str(list(y.shape))
            raise ValueError(f"expected targets {[*rows, self.outputs]}, got {got}")
        if weights is not None and weights.shape != rows:
            raise ValueError(f"expected row weights {list(rows)}, got {list(weights.shape)}")
        x = x.reshape(-1, self.channels)
        y = x.new_zeros(x.shape[0], 0) if y is None else y.reshape(-1, self.outputs)
        scale = x.new_ones(x.shape[0]) if weights is None else weights.reshape(-1)
        read = scale != 0
        x, y, scale = (rows_of[read].to(self._sum_x) for rows_of in (x, y, scale))
        if not all(bool(torch.isfinite(values).all()) for values in (x, y, scale)):
            raise ValueError("calibration rows contain values that are not finite")
        if (scale < 0).any():
            raise ValueError("expected row weights >= 0, got negative ones")
        weighted = x * scale[:, None]
        self._total += scale.sum()
        self._sum_x += weighted.sum(0)
        self._sum_y += scale @ y
        self._sum_xx.addmm_(weighted.T, x)
        self._sum_xy.addmm_(weighted.T, y)
        self._sum_yy += scale @ y.square()
        self.count += x.shape[0]

    @property
    def mean_x(self) -> Tensor:
        """Mean input [channels]."""
        return self._sum_x / self._weight_seen()

    @property
    def mean_y(self) -> Tensor:
        """Mean target [outputs]."""
        return self._sum_y / self._weight_seen()

    @property
    def covariance(self) -> Tensor:
        """Centered Gram matrix of the inputs, per unit of row weight [channels, channels].

        Centering is the same as a constant column in the design matrix: it is what lets a
        repair absorb means in the bias. A channel that varies by less than a millionth of its size
        does not vary: what the difference leaves of it is rounding.
        """
        mean = self.mean_x
        result = self._sum_xx / self._weight_seen()
        smallest = _CONSTANT * result.diagonal()
        result.addr_(mean, mean, alpha=-1)
        constant = result.diagonal() <= smallest
        result[constant] = 0.0
        result[:, constant] = 0.0
        return result

    @property
    def cross_covariance(self) -> Tensor:
        """Centered `X^T Y`, per unit of row weight [channels, outputs]."""
        return self._sum_xy / self._weight_seen() - torch.outer(self.mean_x, self.mean_y)

    @property
    def variance_y(self) -> Tensor:
        """Variance of every target column [outputs]."""
        return (self._sum_yy / self._weight_seen() - self.mean_y.square()).clamp_min(0.0)

    def uncentered(self) -> GramAccumulator:
        """Return the same statistics as if all means were zero: for layers without a bias."""
        result = GramAccumulator(self.channels, self.outputs, device=self._sum_x.device)
        result.load_state_dict(self.state_dict())
        result._sum_x.zero_()
        result._sum_y.zero_()
        return result

    def reordered(self, order: Tensor) -> GramAccumulator:
        """Return the same statistics with the input channels in another order [channels]."""
        result = GramAccumulator(self.channels, self.outputs, device=self._sum_x.device)
        state = self.state_dict()
        for name in ("sum_x", "sum_xx", "sum_xy"):
            state[name] = state[name][order]
        state["sum_xx"] = state["sum_xx"][:, order]
        result.load_state_dict(state)
        return result

    def _weight_seen(self) -> Tensor:
        if self.count == 0:
            raise ValueError("no calibration rows were seen: call update() first")
        return self._total

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything needed to go on later: plain tensors, fit for safetensors."""
        return {
            "count": torch.tensor(self.count),
            "total": self._total.clone(),
            "sum_x": self._sum_x.clone(),
            "sum_y": self._sum_y.clone(),
            "sum_xx": self._sum_xx.clone(),
            "sum_xy": self._sum_xy.clone(),
            "sum_yy": self._sum_yy.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums by saved ones.

        Raises:
            ValueError: A tensor is missing or has another shape; the sums are then unchanged.
        """
        mine = {name: getattr(self, f"_{name}") for name in _SUMS}
        for name, tensor in {"count": torch.tensor(0), **mine}.items():
            if name not in state or state[name].shape != tensor.shape:
                got = list(state[name].shape) if name in state else "nothing"
                raise ValueError(
                    f"saved statistics: expected {name} {list(tensor.shape)}, got {got}"
                )
        self.count = int(state["count"])
        for name, tensor in mine.items():
            tensor.copy_(state[name])
