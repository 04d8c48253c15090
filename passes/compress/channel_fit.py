"""Which units of a coupled group matter, and the refit of the layers that lose the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.passes.axes import ChannelGroup, Member
from graphopt.passes.calibration import Calibration
from graphopt.passes.contractions import Contraction, contraction_of
from graphopt.passes.facts import attribute_of
from graphopt.passes.latest import latest
from graphopt.passes.least_squares import (
    LinearFit,
    elimination_order,
    fit_linear,
    magnitude_scores,
    obs_scores,
    weigh_outputs,
)
from graphopt.passes.program import Program
from graphopt.passes.sensitivity import reaches_outputs


@dataclass(frozen=True)
class ChannelFit:
    """Scores and refits of one program, from data where there is some.

    Attributes:
        program: The program as it is now.
        calibration: Data, None scores by magnitude and refits nothing.
        by_obs: Whether data also scores; else magnitude does.
        damping: Ridge of the refit, as a share of the mean variance of the kept inputs.
    """

    program: Program
    calibration: Calibration | None
    by_obs: bool
    damping: float

    def kept(self, group: ChannelGroup, count: int) -> list[int]:
        """Return the units of a group that stay when `count` do, ascending: smaller sets nest."""
        key = f"order of {group.key}, OBS {self.by_obs}, with {id(self.calibration)}"
        order: list[int] = self.program.fact(key, lambda _: self._order(group))
        return sorted(order[len(order) - count :])

    def fits(self, group: ChannelGroup, kept: list[int]) -> list[tuple[Contraction, LinearFit]]:
        """Return every consumer that can be fitted, refitted on its kept inputs."""

        def compute() -> list[tuple[Contraction, LinearFit]]:
            found = consumers(self.program, group)
            return [(item, self._fitted(group, item, kept)) for item in found]

        key = f"{group.key} {kept} {self.damping} {id(self.calibration)}"
        return latest(self.program, "channel fits", key, compute)

    def _order(self, group: ChannelGroup) -> list[int]:
        """Return the units in the order in which they go, the last to go last."""
        contractions = list(consumers(self.program, group))
        uniform = len({len(unit) for c in group.of("consumer") for unit in c.units()}) == 1
        if not self.by_obs or self.calibration is None or not contractions or not uniform:
            return _ascending(self._magnitudes(group))
        inputs = {c.inputs for c in contractions}
        if len(inputs) == 1 and len({c.window for c in contractions}) == 1:
            covariance, weight, size = self._problem(group, contractions)
            return elimination_order(covariance, weight, group_size=size).tolist()
        scores = torch.zeros(group.size, dtype=torch.float64)
        for contraction in contractions:
            covariance, weight, size = self._problem(group, [contraction])
            scores += obs_scores(covariance, weight, group_size=size).cpu()
        return _ascending(scores)

    def _problem(
        self, group: ChannelGroup, contractions: list[Contraction]
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return covariance, stacked weights and channels per unit, unit by unit in order."""
        assert self.calibration is not None
        first = contractions[0]
        member = _member(group, first)
        channels = [index for unit in member.units() for index in unit]
        order = first.columns(channels)
        weight = torch.cat([self._matrix(c)[:, order] for c in contractions])
        place = self._place(member) if len(contractions) == 1 else None
        if place is None:
            statistics = self.calibration.statistics(self.program, first.inputs, first.unfold)
        else:
            weighted = self.calibration.weighted_statistics(
                self.program, first.inputs[0], first.unfold, place
            )
            statistics, weight = weighted.gram, weigh_outputs(weight, weighted.metric)
        covariance = statistics.covariance[order[:, None], order]
        return covariance, weight, len(order) // group.size

    def _fitted(self, group: ChannelGroup, contraction: Contraction, kept: list[int]) -> LinearFit:
        """Refit a consumer on its kept inputs; without a bias, through the origin."""
        assert self.calibration is not None
        place = self._place(_member(group, contraction))
        statistics = (
            self.calibration.statistics(self.program, contraction.inputs, contraction.unfold)
            if place is None
            else self.calibration.weighted_statistics(
                self.program, contraction.inputs[0], contraction.unfold, place
            ).gram
        )
        bias = None
        if contraction.bias is not None:
            bias = attribute_of(self.program, contraction.bias).detach()
        return fit_linear(
            statistics.uncentered() if bias is None else statistics,
            self._matrix(contraction),
            bias,
            contraction.columns(_member(group, contraction).indices(kept)),
            damping=self.damping,
        )

    def _matrix(self, contraction: Contraction) -> torch.Tensor:
        return contraction.matrix(attribute_of(self.program, contraction.parameter).detach())

    def _place(self, member: Member) -> fx.Node | None:
        """Return the node of a consumer's output if it is one, and the outputs depend on it."""
        if len(member.nodes) != 1 or len(member.inputs) != 1:
            return None
        return member.nodes[0] if reaches_outputs(self.program, member.nodes[0]) else None

    def _magnitudes(self, group: ChannelGroup) -> torch.Tensor:
        """Return the product, over producers and consumers, of the norms of a unit's weights."""
        weights = []
        for member in group.members:
            if member.role in ("producer", "consumer"):
                value = attribute_of(self.program, member.parameter).detach().double()
                squares = value.square().movedim(member.dim, -1)
                squares = squares.reshape(-1, value.shape[member.dim]).sum(0)
                owners = torch.tensor(member.owners, device=value.device)
                sums = squares.new_zeros(group.size)
                sums.index_add_(0, owners[owners >= 0], squares[owners >= 0])
                weights.append(sums.sqrt())
        return magnitude_scores(weights)


def consumers(program: Program, group: ChannelGroup) -> Iterator[Contraction]:
    """Yield the consumers that can be fitted: those that use their weight in no other way."""
    for member in group.of("consumer"):
        alone = sum(other.parameter == member.parameter for other in group.members) == 1
        contraction = contraction_of(program, member) if alone else None
        if contraction is not None:
            yield contraction


def _ascending(scores: torch.Tensor) -> list[int]:
    """Return the indices by score, lowest first; of equal scores the last comes first."""
    order = torch.sort(scores, descending=True, stable=True).indices.flip(0)
    return [int(index) for index in order]


def _member(group: ChannelGroup, contraction: Contraction) -> Member:
    return next(m for m in group.of("consumer") if m.parameter == contraction.parameter)
