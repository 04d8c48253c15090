"""Closed forms for compressing a linear layer from the statistics of its inputs.

The layer is `y = W x + b` with W [outputs, channels]; `covariance` is the centered Gram matrix of
its inputs per row [channels, channels] (`GramAccumulator.covariance`). A *group* is `group_size`
consecutive channels that live or die together: 1 for a hidden unit or a convolution channel,
head_dim for an attention head. Everything is solved in float64; ridge terms are shares of the mean
variance of a channel, so they do not depend on the scale of the data. The module knows no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gram import GramAccumulator

__all__ = [
    "LinearFit",
    "channels_of_groups",
    "damped",
    "eliminate_groups",
    "elimination_order",
    "fit_linear",
    "kept_group_count",
    "magnitude_scores",
    "obs_scores",
    "relative",
    "select_groups",
    "weigh_outputs",
]


@dataclass(frozen=True, kw_only=True)
class LinearFit:
    """A repaired layer.

    Attributes:
        weight: [outputs, kept channels], float64.
        bias: [outputs], float64; it absorbs the mean of what was removed.
        relative_error: Predicted mean squared output error over the variance of the targets.
    """

    weight: Tensor
    bias: Tensor
    relative_error: float


def kept_group_count(groups: int, share: float, round_to: int = 1) -> int:
    """Return how many of `groups` to keep: the largest multiple of `round_to` within the share.

    At least one unit of `round_to` is kept, and never more than there are.

    Raises:
        ValueError: The share is outside (0, 1] or `round_to` is not positive.
    """
    if not 0.0 < share <= 1.0 or round_to < 1:
        raise ValueError(f"expected 0 < share <= 1 and round_to >= 1, got {share} and {round_to}")
    if share == 1.0:
        return groups
    # 0.29 * 100 is 28.999...96 in binary: a share that means a whole number must give that number.
    kept = int(groups * share + 1e-9) // round_to * round_to
    return min(groups, max(kept, round_to))


def channels_of_groups(groups: Tensor, group_size: int) -> Tensor:
    """Return the channel indices of groups [groups] in order [groups * group_size]."""
    offsets = torch.arange(group_size, device=groups.device)
    return (groups[:, None] * group_size + offsets).reshape(-1)


def magnitude_scores(weights: Sequence[Tensor], group_size: int = 1) -> Tensor:
    """Score groups by the product of the norms of all weights that touch them.

    The product does not change when a producer is scaled up and its consumer down by the same
    factor, as the function of the network does not.

    Args:
        weights: Producers and consumers of the same channels, channels last [..., channels].
        group_size: Channels per group.

    Returns:
        Scores [groups], float64; the lowest matter least.
    """
    scores = [
        weight.detach().double().reshape(-1, weight.shape[-1]).square().sum(0) for weight in weights
    ]
    return torch.stack([_sum_groups(s, group_size).sqrt() for s in scores]).prod(0)


def weigh_outputs(weight: Tensor, metric: Tensor) -> Tensor:
    """Return the weight in coordinates where squared length is the output error that matters.

    With M = E[g g^T] of the gradients g that the model's output has at this layer's output, the
    error e costs `e^T M e` to first order (Gauss-Newton, Kronecker-factored as in K-FAC, arXiv
    1503.05671). Scores and elimination on the returned weight count that cost. A least-squares fit
    with unlimited data does not depend on M, so fits take the plain weight.

    Args:
        weight: [outputs, channels].
        metric: Positive semidefinite [outputs, outputs].

    Returns:
        `M^(1/2) weight` [outputs, channels], float64.
    """
    values, vectors = torch.linalg.eigh(metric.detach().double())
    weighed: Tensor = values.clamp_min(0).sqrt()[:, None] * (vectors.T @ weight.detach().double())
    return weighed


def obs_scores(
    covariance: Tensor, weight: Tensor, *, group_size: int = 1, damping: float = 0.01
) -> Tensor:
    """Score groups by the output error of removing each alone and refitting all others.

    `rho_S = tr(W_S [(G^-1)_SS]^-1 W_S^T)`, the structured optimal brain surgeon score of ZipLM
    (arXiv 2302.04089, eq. 2), with G = covariance + damping * mean variance * I.

    Args:
        covariance: Of the inputs [channels, channels].
        weight: [outputs, channels].
        group_size: Channels per group.
        damping: Ridge, as a share of the mean variance.

    Returns:
        Scores [groups], float64, in units of the squared output; the lowest matter least.
    """
    inverse = _inverse(damped(covariance.double(), damping))
    return _removal_errors(inverse, weight.detach().double().T, group_size)


def select_groups(scores: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` highest scores, ascending [keep]; ties keep the first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:keep].sort().values


def eliminate_groups(
    covariance: Tensor,
    weight: Tensor,
    keep: int,
    *,
    group_size: int = 1,
    damping: float = 0.01,
    step: int = 1,
) -> Tensor:
    """Remove groups one after the other, each time those whose loss the others repair best.

    After every removal the weights are the least-squares fit on what is left, by a downdate of the
    inverse (ZipLM, algorithm 1), so two groups that stand in for each other do not both go: that is
    where one-shot scores fail.
    Cost: `keep` from n groups, (n - keep) / step downdates of channels^2 * group_size * step.

    Args:
        covariance: Of the inputs [channels, channels].
        weight: [outputs, channels].
        keep: Number of groups to keep.
        group_size: Channels per group.
        damping: Ridge, as a share of the mean variance.
        step: Groups removed between two rescorings; more is faster and less exact.

    Returns:
        Indices of the kept groups, ascending [keep].

    Raises:
        ValueError: `keep` is not between 1 and the number of groups, or `step` is not positive.
    """
    groups = _group_count(covariance.shape[0], group_size)
    if not 1 <= keep <= groups or step < 1:
        raise ValueError(f"expected 1 <= keep <= {groups} and step >= 1, got {keep} and {step}")
    gone = _eliminations(covariance, weight, keep, group_size, damping, lambda _: step)
    left = torch.ones(groups, dtype=torch.bool, device=covariance.device)
    for removed in gone:
        left[removed] = False
    return left.nonzero().squeeze(1)


def elimination_order(
    covariance: Tensor, weight: Tensor, *, group_size: int = 1, damping: float = 0.01
) -> Tensor:
    """Return all groups in the order in which `eliminate_groups` would remove them.

    The kept sets of all sizes nest, so one run serves every size. At most a 64th of all groups
    and a 16th of those left go between two rescorings.
    Cost: about 110 rescorings for many groups, O(channels^3) in all.

    Args:
        covariance: Of the inputs [channels, channels].
        weight: [outputs, channels].
        group_size: Channels per group.
        damping: Ridge, as a share of the mean variance.

    Returns:
        Indices of the groups, the one that stays longest last [groups].
    """
    groups = _group_count(covariance.shape[0], group_size)

    def step(alive: int) -> int:
        return max(1, min(groups // 64, alive // 16))

    gone = torch.cat(
        [*_eliminations(covariance, weight, 1, group_size, damping, step)]
        or [torch.zeros(0, dtype=torch.long, device=covariance.device)]
    )
    last = torch.ones(groups, dtype=torch.bool, device=covariance.device)
    last[gone] = False
    return torch.cat([gone, last.nonzero().squeeze(1)])


def _eliminations(
    covariance: Tensor,
    weight: Tensor,
    keep: int,
    group_size: int,
    damping: float,
    step: Callable[[int], int],
) -> Iterator[Tensor]:
    """Yield the groups that go together, those that matter least first."""
    inverse = _inverse(damped(covariance.double(), damping))
    fitted = weight.detach().double().T.clone()
    alive = torch.arange(inverse.shape[0] // group_size, device=covariance.device)
    while alive.numel() > keep:
        count = min(step(alive.numel()), alive.numel() - keep)
        order = _removal_errors(inverse, fitted, group_size).sort(stable=True).indices
        yield alive[order[:count]]
        gone, left = order[:count].sort().values, order[count:].sort().values
        s, r = channels_of_groups(gone, group_size), channels_of_groups(left, group_size)
        cross = inverse[r][:, s]
        solved = torch.linalg.solve(inverse[s][:, s], torch.cat([cross.T, fitted[s]], dim=1))
        fitted = fitted[r].addmm_(cross, solved[:, r.numel() :], alpha=-1)
        inverse = inverse[r[:, None], r].addmm_(cross, solved[:, : r.numel()], alpha=-1)
        alive = alive[left]


def fit_linear(
    statistics: GramAccumulator,
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor | None = None,
    *,
    damping: float = 0.1,
) -> LinearFit:
    """Refit a layer on its kept input channels, by ridge regression towards its own weight.

    With targets in the statistics (what the dense model computes here), C their cross-covariance:
    `W' = W_K + (C_K^T - W_K G_KK) (G_KK + lambda I)^-1`, `b' = mean(y) - W' mean(x_K)`.
    Without, the targets are the layer's own outputs on the same inputs, `C = G W^T`: the repair of
    removed channels. With all channels kept it is the identity without targets, and with targets it
    undoes what earlier changes did to the inputs.

    Args:
        statistics: Of the layer's current inputs before removal, with targets or without.
        weight: [outputs, channels].
        bias: [outputs] or none.
        kept: Indices of the channels kept [kept]; default: all.
        damping: Ridge lambda, as a share of the mean variance of the kept inputs.

    Returns:
        The fit and its predicted error against the targets, on the calibration data.

    Raises:
        ValueError: The weight does not fit the statistics.
    """
    outputs, channels = weight.shape
    if channels != statistics.channels or statistics.outputs not in (0, outputs):
        raise ValueError(
            f"expected a weight for {statistics.channels} channels and {statistics.outputs} "
            f"outputs, got {list(weight.shape)}"
        )
    covariance, mean_x = statistics.covariance, statistics.mean_x
    dense = weight.detach().to(covariance)
    if statistics.outputs:
        cross, mean_y = statistics.cross_covariance, statistics.mean_y
        variance = statistics.variance_y.sum()
    else:
        cross = covariance @ dense.T
        mean_y = dense @ mean_x if bias is None else dense @ mean_x + bias.detach().to(mean_x)
        variance = (dense.T * cross).sum()
    if kept is None:
        kept = torch.arange(channels, device=covariance.device)
    gram, cross, prior = covariance[kept][:, kept], cross[kept], dense[:, kept]
    update = torch.linalg.solve(damped(gram, damping), cross - gram @ prior.T)
    fitted = prior + update.T
    error = variance - 2 * (fitted.T * cross).sum() + (fitted @ gram * fitted).sum()
    return LinearFit(
        weight=fitted,
        bias=mean_y - fitted @ mean_x[kept],
        relative_error=relative(error, variance),
    )


def damped(gram: Tensor, damping: float) -> Tensor:
    """Add the ridge. A layer whose inputs never vary gets a unit ridge: any scale serves."""
    scale = gram.diagonal().mean()
    ridge = damping * torch.where(scale > 0, scale, torch.ones_like(scale))
    result = gram.clone()
    result.diagonal().add_(ridge)
    return result


def _inverse(gram: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(gram))


def _removal_errors(inverse: Tensor, fitted: Tensor, group_size: int) -> Tensor:
    """Return `tr(W_S [(G^-1)_SS]^-1 W_S^T)` [groups] for fitted weights [channels, outputs]."""
    groups = _group_count(inverse.shape[0], group_size)
    index = torch.arange(groups, device=inverse.device)
    blocks = inverse.view(groups, group_size, groups, group_size)[index, :, index]
    weights = fitted.view(groups, group_size, -1)
    solved: Tensor = torch.linalg.solve(blocks, weights)
    return (weights * solved).sum((1, 2))


def _sum_groups(values: Tensor, group_size: int) -> Tensor:
    return values.view(_group_count(values.numel(), group_size), group_size).sum(1)


def _group_count(channels: int, group_size: int) -> int:
    if group_size < 1 or channels % group_size:
        raise ValueError(f"expected groups that divide {channels} channels, got {group_size}")
    return channels // group_size


def relative(error: Tensor, variance: Tensor) -> float:
    """Return error / variance; constant targets that are met have no error."""
    return max(0.0, (error / variance).item()) if variance > 0 else 0.0
