"""What a group of coupled channels costs at other sizes: counted, and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from graphopt.passes.axes import ChannelGroup
from graphopt.passes.base import Candidate, Change, Cost
from graphopt.passes.contraction_times import compare_sizes
from graphopt.passes.costs import Costs
from graphopt.passes.facts import facts_of
from graphopt.passes.program import Program
from graphopt.passes.scaling import flops_with, parameters_with

_MOST_LEVELS = 16


def candidate_of(
    pass_name: str,
    program: Program,
    group: ChannelGroup,
    earlier: Mapping[int, int],
    size: int,
) -> Candidate:
    """Return the change of one group with its costs.

    Args:
        pass_name: The pass that makes it.
        program: The program as it is.
        group: The group.
        earlier: New sizes of axes that shrink before it; what it saves is counted after them.
        size: How many units it keeps.
    """
    facts = facts_of(program)
    nodes = dict.fromkeys(node for member in group.members for node in member.nodes)
    before = facts.cost(node for node in nodes if node in facts.nodes)
    # Operations between the members, as attention between its projections, shrink with them.
    through = flops_with(program, {}) - flops_with(program, {group.axis: 0})
    before = replace(before, flops=through)
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
        pass_name=pass_name,
        target=target_of(group),
        summary=f"{group.size} -> {size} {group.kind}",
        details={"group": group.key, "count": size},
    )
    return Candidate(
        change=change,
        before=before,
        after=after,
        shared=frozenset(f"{member.parameter} structure" for member in group.members),
    )


def timed(
    program: Program,
    group: ChannelGroup,
    candidate: Candidate,
    costs: Costs | None,
    *,
    training: bool,
) -> tuple[Candidate, float | None]:
    """Return the candidate with its times and, if it is no faster, dense over its time.

    Fewer channels run the same operations on less, so where the turns do not agree, as on layers
    so small that overhead is all they take, the candidate stands.
    """
    size = int(candidate.change.details["count"])
    times = None
    if costs is not None:
        times = compare_sizes(program, group, size, costs, training=training)
    if times is None:
        return candidate, None
    return candidate.timed(times), times.ratio if times.is_slower else None


def levels_of(group: ChannelGroup, step: int) -> list[int]:
    """Return the sizes to offer, largest first: all heads, else at most 16 even steps."""
    if group.kind != "heads":
        while group.size / step > _MOST_LEVELS:
            step *= 2
    return list(range((group.size - 1) // step * step, 0, -step))


def target_of(group: ChannelGroup) -> str:
    """Return the name of a group in plans: the first parameter that makes its units."""
    producers = group.of("producer") or group.members
    return producers[0].parameter
