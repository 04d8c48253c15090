"""Factors of a linear layer that approximate its outputs best, from the statistics of its inputs.

Everything is solved in float64. The module knows no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gram import GramAccumulator
from .least_squares import damped, relative

_TINY = 1e-150
"""Takes the place of singular values of 0, whose vectors stand for nothing."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """`W x + b ~ up (down x) + bias`.

    Attributes:
        down: [rank, channels], float64.
        up: [outputs, rank], float64.
        bias: [outputs], float64.
        relative_error: Predicted mean squared output error over the variance of the outputs.
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class Whitened:
    """A layer whose inputs were made uncorrelated, decomposed: factors of any rank follow.

    Attributes:
        weight: [outputs, channels], float64.
        bias: [outputs], float64, or none.
        mean_x: Mean input [channels].
        left: Left singular vectors of the weight times the root of the inputs' covariance
            [outputs, full rank].
        values: Its singular values [full rank], descending.
        projected: left^T weight [full rank, channels].
    """

    weight: Tensor
    bias: Tensor | None
    mean_x: Tensor
    left: Tensor
    values: Tensor
    projected: Tensor

    def factors(self, rank: int) -> Factors:
        """Return the factors of a rank and their predicted error.

        Raises:
            ValueError: The rank does not fit.
        """
        outputs, channels = self.weight.shape
        if not 1 <= rank <= min(outputs, channels):
            raise ValueError(f"expected 1 <= rank <= {min(outputs, channels)}, got rank {rank}")
        # With W S = U diag(s) V^T, diag(s_r) V_r^T S^-1 = U_r^T W: nothing is to be inverted.
        share = self.values[:rank].sqrt().clamp_min(_TINY)
        up, down = self.left[:, :rank] * share, self.projected[:rank] / share[:, None]
        lost = self.weight @ self.mean_x - up @ (down @ self.mean_x)
        energy = self.values.square()
        return Factors(
            down=down,
            up=up,
            bias=lost if self.bias is None else lost + self.bias,
            relative_error=relative(energy[rank:].sum(), energy.sum()),
        )


def whiten(
    statistics: GramAccumulator, weight: Tensor, bias: Tensor | None, *, damping: float = 1e-6
) -> Whitened:
    """Decompose a layer so that its outputs, not its weights, are approximated best.

    SVD-LLM (arXiv 2403.07378): G = S S^T (Cholesky), svd(W S) = U diag(s) V^T, up = U_r,
    down = diag(s_r) V_r^T S^-1. The squared error per row is `sum of s_i^2 beyond the rank`,
    exactly (up to the damping). Inputs are centered, the bias absorbs the rest.

    Args:
        statistics: Of the layer's inputs; targets are not used.
        weight: [outputs, channels].
        bias: [outputs] or none.
        damping: Ridge that keeps the Cholesky factor defined, as a share of the mean variance.

    Raises:
        ValueError: The weight does not fit the statistics.
    """
    if weight.shape[1] != statistics.channels:
        raise ValueError(
            f"expected {statistics.channels} channels, got a weight {list(weight.shape)}"
        )
    covariance = statistics.covariance
    dense = weight.detach().to(covariance)
    root = torch.linalg.cholesky(damped(covariance, damping))
    return decomposed(dense, bias, statistics.mean_x, root)


def decomposed(
    weight: Tensor, bias: Tensor | None, mean_x: Tensor, root: Tensor | None
) -> Whitened:
    """Decompose a layer for inputs of a covariance.

    From the eigenvectors of the smaller Gram matrix, several times as fast as singular vectors:
    float64 leaves of singular values below 1e-8 of the largest nothing but noise, whose squares
    no error shows.

    Args:
        weight: [outputs, channels], float64.
        bias: [outputs] or none.
        mean_x: Mean input [channels], float64.
        root: A root of the covariance [channels, channels]; None for white inputs.
    """
    scaled = weight if root is None else weight @ root
    outputs, channels = weight.shape
    if outputs <= channels:
        squares, left = torch.linalg.eigh(scaled @ scaled.t())
    else:
        squares, right = torch.linalg.eigh(scaled.t() @ scaled)
        left = scaled @ right / squares.clamp_min(0).sqrt().clamp_min(_TINY)
    values, left = squares.clamp_min(0).sqrt().flip(0), left.flip(1)
    return Whitened(
        weight=weight,
        bias=None if bias is None else bias.detach().to(weight),
        mean_x=mean_x,
        left=left,
        values=values,
        projected=left.t() @ weight,
    )
