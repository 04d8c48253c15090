"""Statistics of layers' inputs whose rows weigh what the model's outputs lose by an error there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, fx

from .gram import GramAccumulator
from .objective import Objective
from .program import Program, shape_of
from .sensitivity import sensitivity_function
from .unfold import Unfold

_ROWS_PER_BATCH = 16384


@dataclass(frozen=True)
class LayerPlace:
    """Where a contraction reads and writes.

    Attributes:
        source: The node it reads.
        dim: The channel dimension of its value.
        unfold: For a convolution, how its input becomes rows.
        output: The node it writes: channels last or, for images, in dimension 1.
    """

    source: fx.Node
    dim: int
    unfold: Unfold | None
    output: fx.Node

    @property
    def key(self) -> str:
        """A name that the same graph always gives it."""
        return f"weighted statistics {self.source.name}/{self.dim} {self.output.name}"

    @property
    def size_bytes(self) -> int:
        """Bytes of its statistics, about."""
        window = 1 if self.unfold is None else self.unfold.window
        channels = shape_of(self.source)[self.dim] * window
        return 8 * channels**2 + 4 * self.outputs**2

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return shape_of(self.output)[1 if self.unfold else -1]

    def rows(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return inputs [rows, channels], gradients [rows, outputs], and what one stands for."""
        rows = self.unfold(value) if self.unfold else value.movedim(self.dim, -1)
        slopes = gradient.flatten(2).transpose(1, 2) if self.unfold else gradient
        rows, slopes = rows.reshape(-1, rows.shape[-1]), slopes.reshape(-1, slopes.shape[-1])
        kept = thinned(rows)
        slopes = thinned(slopes).to(torch.promote_types(slopes.dtype, torch.float32))
        return kept, slopes, len(rows) / max(len(kept), 1)


@dataclass(frozen=True)
class WeightedStatistics:
    """Statistics whose rows are weighed by their effect on the model's outputs.

    Attributes:
        gram: Of the layer's inputs.
        metric: What output errors cost [outputs, outputs], of the gradients' type: for an error e
            of the layer's output, the objective (see `objective`) loses trace(metric E[e e^T]) to
            second order.
        slope: What the objective loses to first order per weight [outputs, channels] and bias
            [outputs], in the last column; None for outputs, which start from no error.
    """

    gram: GramAccumulator
    metric: Tensor
    slope: Tensor | None

    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return what the objective loses when the layer changes, to second order.

        Rows of inputs and gradients are taken as independent but for the rows' weights, and rows
        among each other too: Kronecker-factored curvature, K-FAC (arXiv 1503.05671).

        Args:
            weight: Change of the weight [outputs, channels].
            bias: Change of the bias [outputs] or none.
        """
        change = weight.to(self.gram.mean_x)
        metric = self.metric.to(change)
        moved = change @ self.gram.mean_x
        if bias is not None:
            moved = moved + bias.to(moved)
        spread = metric @ (change @ self.gram.covariance)
        loss = (spread * change).sum() + moved @ metric @ moved
        if self.slope is not None:
            slope = self.slope.to(change)
            loss = loss + (slope[:, :-1] * change).sum()
            if bias is not None:
                loss = loss + slope[:, -1] @ bias.to(slope)
        return float(loss)

    def state_dict(self) -> dict[str, Tensor]:
        """Return plain tensors, fit for safetensors."""
        state = {**self.gram.state_dict(), "metric": self.metric}
        return state if self.slope is None else {**state, "slope": self.slope}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> WeightedStatistics:
        """Return what `state_dict` described."""
        gram = GramAccumulator(state["sum_x"].numel(), state["sum_y"].numel())
        gram.load_state_dict(state)
        return cls(gram, state["metric"], state.get("slope"))


class Sized(Protocol):
    """Something whose statistics take memory."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its statistics, about."""


S = TypeVar("S", bound=Sized)


def grouped(places: Sequence[S], room_bytes: int) -> Iterator[list[S]]:
    """Yield places whose statistics together take a given room beside those of the largest."""
    group: list[S] = []
    room_bytes += max((place.size_bytes for place in places), default=0)
    for place in places:
        if group and sum(item.size_bytes for item in group) + place.size_bytes > room_bytes:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def collect_weighted(
    program: Program,
    calls: Iterable[Sequence[Tensor]],
    places: Sequence[LayerPlace],
    objective: Objective,
) -> list[WeightedStatistics]:
    """Collect the statistics of some places in one sweep over the data: a pass back per call.

    Args:
        program: The program, in evaluation mode.
        calls: Input tensors of every call.
        places: The places.
        objective: What the rows are weighed by.
    """
    run = sensitivity_function(
        program, [place.source for place in places], [place.output for place in places], objective
    )
    sums: list[tuple[GramAccumulator, Tensor, Tensor | None]] = []
    total = 0.0
    for number, tensors in enumerate(calls):
        values, gradients = run(tensors, number)
        weight = objective.weight(tensors)
        total += weight
        for index, (place, value) in enumerate(zip(places, values, strict=True)):
            rows, slopes, share = place.rows(value, gradients[index])
            if index == len(sums):
                sums.append(_empty(rows.shape[-1], slopes, first_order=objective.loss))
            gram, metric, slope = sums[index]
            if slope is not None:
                slope[:, :-1] += weight * share * (slopes.T @ rows.to(slopes))
                slope[:, -1] += weight * share * slopes.sum(0)
                # The mean loss has the gradients of its terms divided by their number; half of
                # their mean outer product is the curvature.
                slopes = slopes * (weight / 2**0.5)
            read = slopes.abs().amax(-1) > 0
            rows, slopes = rows[read], slopes[read] * share**0.5
            gram.update(rows, weights=slopes.square().sum(-1))
            metric.addmm_(slopes.T, slopes)
    total = max(total, 1.0)
    return [
        WeightedStatistics(gram, metric / total, None if slope is None else slope / total)
        for gram, metric, slope in sums
    ]


def thinned(rows: Tensor) -> Tensor:
    """Keep evenly spaced rows where there are very many (convolutions see every pixel)."""
    step = -(-rows.shape[0] // _ROWS_PER_BATCH)
    return rows[::step]


def _empty(
    channels: int, slopes: Tensor, *, first_order: bool
) -> tuple[GramAccumulator, Tensor, Tensor | None]:
    outputs = slopes.shape[-1]
    return (
        GramAccumulator(channels, device=slopes.device),
        slopes.new_zeros(outputs, outputs),
        slopes.new_zeros(outputs, channels + 1) if first_order else None,
    )
