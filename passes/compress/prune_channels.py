"""Remove hidden units, attention heads and convolution channels, physically."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, final

import torch
from torch import fx, nn

from graphopt.passes.axes import ChannelGroup, Member, axes_of
from graphopt.passes.axis_sizes import attributes_with, resize_arguments
from graphopt.passes.base import (
    Candidate,
    Change,
    Context,
    Cost,
    Miss,
    Pass,
    Proposal,
    State,
)
from graphopt.passes.compress.channel_slices import (
    set_everywhere,
    slice_details,
    sliced,
)
from graphopt.passes.compress.scores import check_scores
from graphopt.passes.contraction_times import compare_sizes
from graphopt.passes.contractions import Contraction, contraction_of
from graphopt.passes.errors import PlanError, PreconditionError
from graphopt.passes.facts import attribute_of, facts_of, total_cost
from graphopt.passes.least_squares import (
    LinearFit,
    eliminate_groups,
    fit_linear,
    kept_group_count,
    magnitude_scores,
    obs_scores,
    select_groups,
    weigh_outputs,
)
from graphopt.passes.program import Program
from graphopt.passes.ranges import parse_ranges
from graphopt.passes.scaling import flops_with, parameters_with
from graphopt.passes.sensitivity import reaches_outputs
from graphopt.passes.uniform_share import largest_share

_KINDS = ("heads", "hidden units", "channels")


@final
@dataclass(frozen=True, kw_only=True)
class PruneChannels(Pass):
    """Remove whole units of coupled channels from every parameter they run through.

    before: y = W2 f(W1 x + b1) + b2             W1 [units, in], W2 [out, units]
    after:  y = W2' f(W1[K] x + b1[K]) + b2'     K: the units kept

    Units are hidden units of feed-forward blocks, attention heads (with grouped queries: a
    key/value head and its query heads) and convolution channels, found as coupled groups by
    dataflow (`axes`). Without data they are scored by magnitude; with calibration data by OBS,
    rows and errors weighed by what the model's outputs lose (`sensitivity`), eliminated one after
    the other on the already pruned prefix, and the layer behind them is
    refitted by least squares, the bias absorbing means (`least_squares.fit_linear`). The same
    share is kept in all groups, the largest that meets the budget; `Context.keep` overrides it
    by pattern.

    Cost: for a group of n channels one pass over the calibration data and O(n^3).
    Source: ZipLM, Kurtic et al. 2023 (arXiv 2302.04089); repair: FLAP, An et al. 2023.

    Attributes:
        share: Share of units kept where the context has no budget.
        round_to: Units left are a multiple of this, heads excepted; 0 chooses: 8 on a CPU, on a
            GPU 64 for groups of 512 and more, else 16.
        scores: "auto" (OBS with calibration data, else magnitude), "magnitude" or "obs".
        repair: Whether the following layer is refitted where there is calibration data.
        damping: Ridge of the refit, as a share of the mean variance of the kept inputs.
        head_loss: Share of heads removed per share of other units removed. Per FLOP a head costs
            about twice the quality of hidden units (benchmarks/minilm_compression.py).
    """

    name: ClassVar[str] = "prune-channels"
    exact: ClassVar[bool] = False

    share: float = 0.5
    round_to: int = 0
    scores: str = "auto"
    repair: bool = True
    damping: float = 0.1
    head_loss: float = 0.3

    def requires(self, program: Program, context: Context) -> None:
        """Refuse options that no model can satisfy."""
        if not 0 < self.share <= 1 or self.round_to < 0 or self.damping <= 0:
            raise PreconditionError(
                f"{self.name} needs 0 < share <= 1, round_to >= 0 and damping > 0, got "
                f"share={self.share}, round_to={self.round_to}, damping={self.damping}"
            )
        check_scores(self.name, self.scores, context)

    def propose(self, program: Program, context: Context) -> Proposal:
        """Propose the same share for every group that can be pruned."""
        groups: list[ChannelGroup] = []
        misses: list[Miss] = []
        for group in axes_of(program).groups():
            reason = _refusal(group, context)
            if reason is None:
                groups.append(group)
            else:
                misses.append(Miss(pass_name=self.name, target=_target(group), reason=reason))
        candidates: dict[int, Candidate] = {}
        slow = True
        while slow:
            sizes = self._sizes(program, context, groups)
            slow = False
            for group in list(groups):
                if sizes[group.axis] == group.size:
                    continue
                smaller = {g.axis: sizes[g.axis] for g in groups[: groups.index(group)]}
                candidate, reason = _measured(program, group, smaller, sizes[group.axis], context)
                candidates[group.axis] = candidate
                if reason is not None:
                    misses.append(Miss(pass_name=self.name, target=_target(group), reason=reason))
                    groups.remove(group)
                    slow = True
        for group in groups:
            if sizes[group.axis] == group.size:
                reason = self._whole(group, context)
                misses.append(Miss(pass_name=self.name, target=_target(group), reason=reason))
        misses.extend(self._shortfall(program, context, groups, sizes))
        changed = [candidates[g.axis] for g in groups if sizes[g.axis] != g.size]
        return Proposal(candidates=tuple(changed), misses=tuple(misses))

    def settle(self, program: Program, candidate: Candidate, context: Context) -> Candidate:
        """Choose the units that stay, on the program as it is now."""
        change = candidate.change
        group = axes_of(program).group(change.details["group"])
        count = int(change.details["count"])
        kept = self._select(program, group, count, context)
        error = self._predicted_error(program, group, kept, context)
        details = slice_details(program, group, kept)
        return replace(candidate, change=replace(change, details=details), predicted_error=error)

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Slice every member; refit the consumers where there is calibration data."""
        group = axes_of(program).group(change.details["group"])
        kept = parse_ranges(change.details["kept"], group.size)
        state = sliced(program, group, kept)
        if self.repair and context.calibration is not None:
            for contraction in _consumers(program, group):
                fit = self._fitted(program, group, contraction, kept, context)
                weight = attribute_of(program, contraction.parameter).detach()
                state[contraction.parameter] = contraction.weight(fit.weight, weight)
                if contraction.bias is not None:
                    state[contraction.bias] = fit.bias
        return state

    def apply(self, program: Program, change: Change) -> None:
        """Resize members, module attributes and the sizes in the graph."""
        details = change.details
        group = axes_of(program).group(str(details.get("group")))
        kept = parse_ranges(details.get("kept"), group.size)
        if not group.prunable:
            raise PlanError(f"{_target(group)} cannot be pruned: {group.reasons[0]}")
        if details != slice_details(program, group, kept):
            raise PlanError(
                f"the change of {_target(group)} does not describe this model; "
                "was the plan edited or made for another model?"
            )
        sizes = {group.axis: len(kept)}
        attributes = attributes_with(program, sizes)
        state = sliced(program, group, kept)
        resize_arguments(program, sizes)
        for name, value in state.items():
            set_everywhere(program.model, name, value)
        for module, values in attributes.items():
            for attribute, count in values.items():
                setattr(program.module(module), attribute, count)
        program.changed()

    def restore(self, model: nn.Module, change: Change) -> None:
        """Give every member its full size back; what was removed is zero."""
        for name, slices in change.details["slices"].items():
            parent, _, attribute = name.rpartition(".")
            value = getattr(model.get_submodule(parent), attribute).detach()
            for dim, size, kept in slices:
                full = list(value.shape)
                full[dim] = size
                indices = torch.tensor(parse_ranges(kept, size), device=value.device)
                value = value.new_zeros(full).index_copy(dim, indices, value)
            set_everywhere(model, name, value)
        for module, values in change.details["attributes"].items():
            for attribute, (before, _) in values.items():
                setattr(model.get_submodule(module), attribute, before)

    def _whole(self, group: ChannelGroup, context: Context) -> str:
        """Say why a group that could be pruned keeps all its units."""
        if context.kept_share(0.0, *_names(group)) == 1:
            return "it is kept whole by a pattern"
        step = self._step(group)
        return f"all {group.size} {group.kind} fit when rounded to {step}"

    def _shortfall(
        self,
        program: Program,
        context: Context,
        groups: Sequence[ChannelGroup],
        sizes: Mapping[int, int],
    ) -> list[Miss]:
        """Say where even the smallest sizes do not meet the budget."""
        if context.budget is None:
            return []
        share = flops_with(program, sizes) / max(total_cost(program).flops, 1)
        if share <= context.budget:
            return []
        text = (
            f"the {len(groups)} groups that can shrink leave {share:.1%} of the forward FLOPs at "
            f"their smallest; the budget is {context.budget:.1%}"
        )
        return [Miss(pass_name=self.name, target="(model)", reason=text)]

    def _step(self, group: ChannelGroup) -> int:
        """Return what the number of units left is a multiple of."""
        if group.kind == "heads":
            return 1
        if self.round_to:
            return self.round_to
        on_gpu = any(node.meta["val"].is_cuda for m in group.members for node in m.nodes)
        if not on_gpu:
            return 8
        return 64 if group.size >= 512 else 16

    def _sizes(
        self, program: Program, context: Context, groups: Sequence[ChannelGroup]
    ) -> dict[int, int]:
        """Find the largest share that meets the budget, the same for all groups of a kind.

        Heads lose `head_loss` of the share that other units lose, unless that cannot meet the
        budget; then all lose the same.
        """

        def sizes(share: float, head_loss: float) -> dict[int, int]:
            shares = {"heads": 1 - (1 - share) * head_loss}
            return {
                group.axis: kept_group_count(
                    group.size,
                    context.kept_share(shares.get(group.kind, share), *_names(group)),
                    self._step(group),
                )
                for group in groups
            }

        if context.budget is None:
            return sizes(self.share, self.head_loss)
        budget = context.budget * total_cost(program).flops

        def fits(share: float, head_loss: float) -> bool:
            return flops_with(program, sizes(share, head_loss)) <= budget

        for head_loss in (self.head_loss, 1.0):
            share = largest_share(partial(fits, head_loss=head_loss))
            if fits(share, head_loss):
                break
        return sizes(share, head_loss)

    def _select(
        self, program: Program, group: ChannelGroup, count: int, context: Context
    ) -> list[int]:
        contractions = list(_consumers(program, group))
        uniform = len({len(unit) for c in group.of("consumer") for unit in c.units()}) == 1
        if (
            self.scores == "magnitude"
            or context.calibration is None
            or not contractions
            or not uniform
        ):
            return select_groups(_magnitudes(program, group), count).tolist()
        inputs = {c.inputs for c in contractions}
        if len(inputs) == 1 and len({c.window for c in contractions}) == 1:
            covariance, weight, size = self._problem(program, group, contractions, context)
            step = max(1, (group.size - count) // 64)
            return eliminate_groups(
                covariance, weight, count, group_size=size, step=step, damping=0.01
            ).tolist()
        scores = torch.zeros(group.size, dtype=torch.float64)
        for contraction in contractions:
            covariance, weight, size = self._problem(program, group, [contraction], context)
            scores += obs_scores(covariance, weight, group_size=size).cpu()
        return select_groups(scores, count).tolist()

    def _problem(
        self,
        program: Program,
        group: ChannelGroup,
        contractions: list[Contraction],
        context: Context,
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return covariance, stacked weights and channels per unit, unit by unit in order."""
        assert context.calibration is not None
        first = contractions[0]
        member = _member(group, first)
        channels = [index for unit in member.units() for index in unit]
        order = first.columns(channels)
        weight = torch.cat(
            [c.matrix(attribute_of(program, c.parameter).detach())[:, order] for c in contractions]
        )
        place = _place(program, member) if len(contractions) == 1 else None
        if place is None:
            statistics = context.calibration.statistics(program, first.inputs, first.unfold)
        else:
            weighted = context.calibration.weighted_statistics(
                program, first.inputs[0], first.unfold, place
            )
            statistics, weight = weighted.gram, weigh_outputs(weight, weighted.metric)
        covariance = statistics.covariance[order][:, order]
        return covariance, weight, len(order) // group.size

    def _fitted(
        self,
        program: Program,
        group: ChannelGroup,
        contraction: Contraction,
        kept: list[int],
        context: Context,
    ) -> LinearFit:
        """Refit a consumer on its kept inputs; without a bias, through the origin."""
        assert context.calibration is not None
        place = _place(program, _member(group, contraction))
        statistics = (
            context.calibration.statistics(program, contraction.inputs, contraction.unfold)
            if place is None
            else context.calibration.weighted_statistics(
                program, contraction.inputs[0], contraction.unfold, place
            ).gram
        )
        bias = None
        if contraction.bias is not None:
            bias = attribute_of(program, contraction.bias).detach()
        return fit_linear(
            statistics.uncentered() if bias is None else statistics,
            contraction.matrix(attribute_of(program, contraction.parameter).detach()),
            bias,
            contraction.columns(_member(group, contraction).indices(kept)),
            damping=self.damping,
        )

    def _predicted_error(
        self, program: Program, group: ChannelGroup, kept: list[int], context: Context
    ) -> float | None:
        """Return the largest relative output error of the consumers, on the calibration data."""
        if context.calibration is None or not self.repair:
            return None
        errors = [
            self._fitted(program, group, contraction, kept, context).relative_error ** 0.5
            for contraction in _consumers(program, group)
        ]
        return max(errors, default=None)


def _names(group: ChannelGroup) -> list[str]:
    """Return the names a pattern can match: the parameters that make or consume the units."""
    return [member.parameter for member in group.members if member.role in ("producer", "consumer")]


def _target(group: ChannelGroup) -> str:
    producers = group.of("producer") or group.members
    return f"{producers[0].parameter} ({group.size} {group.kind})"


def _refusal(group: ChannelGroup, context: Context) -> str | None:
    if group.reasons:
        return group.reasons[0]
    pattern = context.ignored_by(*_names(group))
    if pattern is not None:
        return f"ignored by the pattern {pattern!r}"
    if group.kind not in _KINDS:
        return f"a {group.kind} is left as it is"
    if group.size == 1:
        return "it has one unit only"
    return None


def _consumers(program: Program, group: ChannelGroup) -> Iterator[Contraction]:
    """Yield the consumers that can be fitted: those that use their weight in no other way."""
    for member in group.of("consumer"):
        alone = sum(other.parameter == member.parameter for other in group.members) == 1
        contraction = contraction_of(program, member) if alone else None
        if contraction is not None:
            yield contraction


def _place(program: Program, member: Member) -> fx.Node | None:
    """Return the node of a consumer's output if there is one, and the outputs depend on it."""
    if len(member.nodes) != 1 or len(member.inputs) != 1:
        return None
    return member.nodes[0] if reaches_outputs(program, member.nodes[0]) else None


def _member(group: ChannelGroup, contraction: Contraction) -> Member:
    return next(m for m in group.of("consumer") if m.parameter == contraction.parameter)


def _magnitudes(program: Program, group: ChannelGroup) -> torch.Tensor:
    """Return the product, over producers and consumers, of the norms of a unit's weights."""
    weights = []
    for member in group.members:
        if member.role in ("producer", "consumer"):
            value = attribute_of(program, member.parameter).detach().double()
            norms = value.movedim(member.dim, -1).reshape(-1, value.shape[member.dim]).norm(dim=0)
            weights.append(torch.stack([norms[unit].norm() for unit in member.units()]))
    return magnitude_scores(weights)


def _candidate(
    program: Program, group: ChannelGroup, earlier: Mapping[int, int], size: int
) -> Candidate:
    """Return a candidate with what it saves once the axes before it have their new sizes."""
    facts = facts_of(program)
    nodes = dict.fromkeys(node for member in group.members for node in member.nodes)
    before = facts.cost(node for node in nodes if node in facts.nodes)
    later = {**earlier, group.axis: size}
    saved = flops_with(program, earlier) - flops_with(program, later)
    removed = parameters_with(program, earlier) - parameters_with(program, later)
    width = before.size_bytes // max(before.parameters, 1)
    after = Cost(
        flops=before.flops - saved,
        parameters=before.parameters - removed,
        size_bytes=before.size_bytes - removed * width,
    )
    change = Change(
        pass_name=PruneChannels.name,
        target=_target(group).partition(" ")[0],
        summary=f"{group.size} -> {size} {group.kind}",
        details={"group": group.key, "count": size},
    )
    return Candidate(change=change, before=before, after=after)


def _measured(
    program: Program,
    group: ChannelGroup,
    earlier: Mapping[int, int],
    size: int,
    context: Context,
) -> tuple[Candidate, str | None]:
    """Return the candidate with its times, and why it is refused, None if it is not."""
    candidate = _candidate(program, group, earlier, size)
    if context.costs is None:
        return candidate, None
    times = compare_sizes(program, group, size, context.costs, training=context.training)
    if times is None:
        return candidate, None
    timed = replace(
        candidate,
        before=replace(candidate.before, latency_ms=times.dense_ms),
        after=replace(candidate.after, latency_ms=times.candidate_ms),
    )
    if times.ratio > 1:
        return timed, None
    return timed, f"{size} of {group.size} {group.kind} measured {times.ratio:.2f}x, kept as it is"
