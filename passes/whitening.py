"""Factors of a linear layer that approximate its outputs best, from the statistics of its inputs.

Everything is solved in float64. The module knows no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gram import GramAccumulator
from .least_squares import damped, relative


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
        root: Lower triangular root of the covariance [channels, channels].
        left: Left singular vectors of weight @ root [outputs, full rank].
        values: Its singular values [full rank], descending.
        right: Its right singular vectors [full rank, channels].
    """

    weight: Tensor
    bias: Tensor | None
    mean_x: Tensor
    root: Tensor
    left: Tensor
    values: Tensor
    right: Tensor

    def factors(self, rank: int) -> Factors:
        """Return the factors of a rank and their predicted error.

        Raises:
            ValueError: The rank does not fit.
        """
        outputs, channels = self.weight.shape
        if not 1 <= rank <= min(outputs, channels):
            raise ValueError(f"expected 1 <= rank <= {min(outputs, channels)}, got rank {rank}")
        share = self.values[:rank].sqrt()
        up = self.left[:, :rank] * share
        whitened = share[:, None] * self.right[:rank]
        down = torch.linalg.solve_triangular(self.root, whitened, upper=False, left=False)
        lost = (self.weight - up @ down) @ self.mean_x
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
    left, values, right = torch.linalg.svd(dense @ root, full_matrices=False)
    return Whitened(
        weight=dense,
        bias=None if bias is None else bias.detach().to(covariance),
        mean_x=statistics.mean_x,
        root=root,
        left=left,
        values=values,
        right=right,
    )
