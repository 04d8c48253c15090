"""Weights rounded to integers so that the layer's outputs change little.

A layer is `y = W x` with W [outputs, channels]; integers times scales take the place of W, with a
scale per output or per group of channels. Everything is solved in float64. The module knows no
graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.quantized_weights import largest_integer

__all__ = ["clipped_scales", "round_compensated", "round_nearest", "stood_for"]

_SHRINKS = torch.linspace(1.0, 0.5, 26).tolist()
_BLOCK = 64
_CACHED = 2**15
"""Weights whose scales are searched at once."""


def clipped_scales(
    matrix: Tensor, bits: int, group_size: int = 0, power: Tensor | None = None
) -> Tensor:
    """Return the scales with which rounding to the nearest errs least, in mean squares.

    Large weights may be cut off: with few bits finer steps for the others are worth more.

    Args:
        matrix: W [outputs, channels].
        bits: 8 or 4.
        group_size: Channels that share a scale, 0 for all of them.
        power: How much every channel varies [channels]; None takes all alike.

    Returns:
        [outputs] or [outputs, groups], float64.
    """
    groups = matrix.detach().double().unflatten(1, (-1, group_size or matrix.shape[1]))
    weights = torch.ones_like(groups[:1]) if power is None else power.double().view_as(groups[:1])
    # Rows are independent; few at a time stay in the processor's cache.
    rows = max(1, _CACHED // matrix.shape[1])
    scales = torch.cat([_best_scales(part, bits, weights) for part in groups.split(rows)])
    scales = scales.squeeze(2)
    return scales if group_size else scales[:, 0]


def _best_scales(groups: Tensor, bits: int, weights: Tensor) -> Tensor:
    """Return the best scale of each group [rows, groups, 1] of weights [rows, groups, channels]."""
    # Rows of zeros stay zeros.
    largest = groups.abs().amax(2, keepdim=True)
    widest = torch.where(largest == 0, 1.0, largest) / largest_integer(bits)
    best = torch.full_like(widest, torch.inf)
    scales = widest
    for shrink in _SHRINKS:
        tried = widest * shrink
        error = _nearest(groups, tried, bits).mul_(tried).sub_(groups).square_().mul_(weights)
        total = error.sum(2, keepdim=True)
        scales = torch.where(total < best, tried, scales)
        best = torch.minimum(best, total)
    return scales


def round_nearest(matrix: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the nearest integers [outputs, channels], int8."""
    return _nearest(matrix.detach().double(), _spread(scales, matrix), bits).to(torch.int8)


def round_compensated(
    matrix: Tensor, scales: Tensor, bits: int, covariance: Tensor, damping: float = 0.01
) -> Tensor:
    """Return integers such that later channels make up for the rounding of earlier ones.

    Source: GPTQ, Frantar et al. 2022 (arXiv 2210.17323), channels that vary most first.
    Cost: O(channels^3 + outputs * channels^2).

    Args:
        matrix: W [outputs, channels].
        scales: As `clipped_scales` returns them.
        bits: 8 or 4.
        covariance: Gram matrix of the inputs per row [channels, channels].
        damping: Ridge, as a share of the mean variance of a channel.

    Returns:
        [outputs, channels], int8.
    """
    variance = covariance.diagonal()
    ridge = damping * variance.mean()
    if not ridge > 0:
        return round_nearest(matrix, scales, bits)
    order = variance.argsort(descending=True, stable=True)
    gram = covariance[order][:, order] + ridge * torch.eye(len(order), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)
    # A channel is a row here, so that it is contiguous.
    rest = matrix.detach().double().t()[order]
    steps = _spread(scales, matrix).t()[order]
    integers = torch.empty_like(rest)
    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        errors = torch.empty_like(rest[start:stop])
        for channel in range(start, stop):
            integers[channel] = _nearest(rest[channel], steps[channel], bits)
            error = rest[channel] - integers[channel] * steps[channel]
            errors[channel - start] = error / factor[channel, channel]
            rest[channel:stop].addr_(
                factor[channel, channel:stop], errors[channel - start], alpha=-1
            )
        rest[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return integers[order.argsort()].t().to(torch.int8)


def stood_for(integers: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers that integers stand for [outputs, channels], float64."""
    return integers.double() * _spread(scales, integers)


def _nearest(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    largest = largest_integer(bits)
    # -128 would gain nothing, -8 is one of few.
    return (values / scales).round_().clamp_(-largest - (bits == 4), largest)


def _spread(scales: Tensor, matrix: Tensor) -> Tensor:
    """Return the scale of every weight [outputs, channels]."""
    if scales.dim() == 1:
        return scales[:, None].expand_as(matrix)
    return scales.repeat_interleave(matrix.shape[1] // scales.shape[1], dim=1)
