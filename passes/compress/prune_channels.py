"""Remove hidden units, attention heads and convolution channels, physically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, final

import torch
from torch import nn

from graphopt.passes.axes import ChannelGroup, axes_of
from graphopt.passes.axis_sizes import attributes_with, resize_arguments
from graphopt.passes.base import Candidate, Change, Context, Miss, Pass, Proposal, State
from graphopt.passes.compress.channel_costs import candidate_of, levels_of, target_of, timed
from graphopt.passes.compress.channel_fit import ChannelFit, consumers
from graphopt.passes.compress.channel_slices import (
    set_everywhere,
    slice_details,
    sliced,
    widened,
)
from graphopt.passes.compress.levels import slower
from graphopt.passes.compress.scores import check_scores
from graphopt.passes.errors import PlanError, PreconditionError
from graphopt.passes.facts import attribute_of, total_cost
from graphopt.passes.least_squares import kept_group_count
from graphopt.passes.program import Program
from graphopt.passes.ranges import parse_ranges
from graphopt.passes.scaling import flops_with
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
        share: Share of units kept where the context has no budget; 1 prunes for a budget only.
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
        groups, misses = self._groups(program, context)
        candidates: dict[int, Candidate] = {}
        slow = True
        while slow:
            sizes = self._sizes(program, context, groups)
            slow = False
            for group in list(groups):
                if sizes[group.axis] == group.size:
                    continue
                smaller = {g.axis: sizes[g.axis] for g in groups[: groups.index(group)]}
                size = sizes[group.axis]
                candidates[group.axis], ratio = timed(
                    program,
                    group,
                    candidate_of(self.name, program, group, smaller, size),
                    context.costs,
                    training=context.training,
                )
                if ratio is not None:
                    text = f"{size} of {group.size} {group.kind} measured {ratio:.2f}x"
                    misses.append(self._miss(group, f"{text}, kept as it is"))
                    groups.remove(group)
                    slow = True
        for group in groups:
            if sizes[group.axis] == group.size:
                reason = self._whole(group, context)
                misses.append(self._miss(group, reason))
        misses.extend(self._shortfall(program, context, groups, sizes))
        changed = [candidates[g.axis] for g in groups if sizes[g.axis] != g.size]
        return Proposal(candidates=tuple(changed), misses=tuple(misses))

    def offer(self, program: Program, context: Context) -> Proposal:
        """Offer even steps of every group's size, for heads every number, down to the smallest."""
        groups, misses = self._groups(program, context)
        candidates: list[Candidate] = []
        for group in groups:
            if context.kept_share(0.0, *_names(group)) == 1:
                misses.append(self._miss(group, "it is kept whole by a pattern"))
                continue
            refused: list[tuple[str, float]] = []
            for size in levels_of(group, self._step(group)):
                candidate, ratio = timed(
                    program,
                    group,
                    candidate_of(self.name, program, group, {}, size),
                    context.costs,
                    training=context.training,
                )
                if ratio is None:
                    candidates.append(candidate)
                else:
                    refused.append((f"{size} of {group.size} {group.kind}", ratio))
            if refused:
                misses.append(self._miss(group, slower(refused)))
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def settle(self, program: Program, candidate: Candidate, context: Context) -> Candidate:
        """Choose the units that stay, on the program as it is now."""
        change = candidate.change
        group = axes_of(program).group(change.details["group"])
        fit = self._fit(program, context)
        kept = fit.kept(group, int(change.details["count"]))
        error: float | None = None
        if self.repair and context.calibration is not None:
            errors = [fitted.relative_error**0.5 for _, fitted in fit.fits(group, kept)]
            error = max(errors, default=None)
        details = slice_details(program, group, kept)
        return replace(candidate, change=replace(change, details=details), predicted_error=error)

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Slice every member; refit the consumers where there is calibration data."""
        group = axes_of(program).group(change.details["group"])
        kept = parse_ranges(change.details["kept"], group.size)
        state = sliced(program, group, kept)
        if self.repair and context.calibration is not None:
            for contraction, fitted in self._fit(program, context).fits(group, kept):
                weight = attribute_of(program, contraction.parameter).detach()
                state[contraction.parameter] = contraction.weight(fitted.weight, weight)
                if contraction.bias is not None:
                    state[contraction.bias] = fitted.bias
        return state

    def reconstruct(self, program: Program, change: Change, state: State) -> State | None:
        """Return what reads the units, with zeros for those that go, and the repaired biases.

        None where no parameter reads them.
        """
        group = axes_of(program).group(change.details["group"])
        readers = {member.parameter for member in group.of("consumer")}
        if not readers:
            return None
        biases = {item.bias for item in consumers(program, group) if item.bias is not None}
        return {
            name: widened(program, change, name, value)
            for name, value in state.items()
            if name in readers | biases
        }

    def apply(self, program: Program, change: Change) -> None:
        """Resize members, module attributes and the sizes in the graph."""
        details = change.details
        group = axes_of(program).group(str(details.get("group")))
        kept = parse_ranges(details.get("kept"), group.size)
        if not group.prunable:
            raise PlanError(f"{_label(group)} cannot be pruned: {group.reasons[0]}")
        if details != slice_details(program, group, kept):
            raise PlanError(
                f"the change of {_label(group)} does not describe this model; "
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

    def _fit(self, program: Program, context: Context) -> ChannelFit:
        return ChannelFit(
            program, context.calibration, by_obs=self.scores != "magnitude", damping=self.damping
        )

    def _groups(self, program: Program, context: Context) -> tuple[list[ChannelGroup], list[Miss]]:
        """Return the groups that can be pruned, and why the others cannot."""
        groups: list[ChannelGroup] = []
        misses: list[Miss] = []
        for group in axes_of(program).groups():
            reason = _refusal(group, context)
            if reason is None:
                groups.append(group)
            else:
                misses.append(self._miss(group, reason))
        return groups, misses

    def _miss(self, group: ChannelGroup, reason: str) -> Miss:
        return Miss(pass_name=self.name, target=_label(group), reason=reason)

    def _whole(self, group: ChannelGroup, context: Context) -> str:
        """Say why a group that could be pruned keeps all its units."""
        if context.kept_share(0.0, *_names(group)) == 1:
            return "it is kept whole by a pattern"
        if context.budget is None and self.share == 1:
            return "no budget asks for less; give one, such as '60%'"
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


def _names(group: ChannelGroup) -> list[str]:
    """Return the names a pattern can match: the parameters that make or consume the units."""
    return [member.parameter for member in group.members if member.role in ("producer", "consumer")]


def _label(group: ChannelGroup) -> str:
    return f"{target_of(group)} ({group.size} {group.kind})"


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
