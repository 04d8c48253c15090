"""What a group of coupled channels holds, cut to the units that stay or put into another order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from graphopt.passes.axes import ChannelGroup, Member
from graphopt.passes.axis_sizes import attributes_with
from graphopt.passes.base import Change, State, set_tensor, shared_names
from graphopt.passes.facts import attribute_of
from graphopt.passes.program import Program
from graphopt.passes.ranges import format_ranges, parse_ranges


def sliced(program: Program, group: ChannelGroup, kept: list[int]) -> State:
    """Return every parameter and buffer of a group with only the kept units."""
    state: State = {}
    for name, dims in _dimensions(group).items():
        value = attribute_of(program, name).detach()
        for dim, member in dims.items():
            indices = torch.tensor(member.indices(kept), device=value.device)
            value = value.index_select(dim, indices)
        state[name] = value
    return state


def permuted(program: Program, orders: Iterable[tuple[ChannelGroup, Sequence[int]]]) -> State:
    """Return every parameter and buffer of some groups with the units in another order.

    The program computes the same with them, up to the order of sums. A parameter of several groups
    is permuted along several dimensions.

    Args:
        program: The program.
        orders: Groups, each with the unit that comes at every place.
    """
    state: State = {}
    for group, order in orders:
        for name, dims in _dimensions(group).items():
            value = state.get(name, attribute_of(program, name).detach())
            for dim, member in dims.items():
                source = torch.tensor(member.reordered(order), device=value.device)
                value = value.index_select(dim, source)
            state[name] = value
    return state


def slice_details(program: Program, group: ChannelGroup, kept: list[int]) -> dict[str, Any]:
    """Return what replaying and undoing needs, as JSON values."""
    slices = {
        name: [
            [dim, len(member.owners), format_ranges(member.indices(kept))]
            for dim, member in sorted(dims.items())
        ]
        for name, dims in _dimensions(group).items()
    }
    attributes = {
        module: {
            attribute: [getattr(program.module(module), attribute), value]
            for attribute, value in values.items()
        }
        for module, values in attributes_with(program, {group.axis: len(kept)}).items()
    }
    return {
        "group": group.key,
        "count": len(kept),
        "kept": format_ranges(kept),
        "slices": slices,
        "attributes": attributes,
    }


def widened(program: Program, change: Change, name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a parameter that a change has cut at its full size again: zeros for what went.

    Args:
        program: The program without the change.
        change: What `slice_details` describes.
        name: The parameter.
        value: Its value after the change.
    """
    value = value.to(attribute_of(program, name))
    for dim, size, kept in change.details["slices"].get(name, ()):
        full = list(value.shape)
        full[dim] = size
        indices = torch.tensor(parse_ranges(kept, size), device=value.device)
        value = value.new_zeros(full).index_copy(dim, indices, value)
    return value


def set_everywhere(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a tensor under all its names, so that tied weights stay tied."""
    names = shared_names(model, name)
    set_tensor(model, names[0], value)
    parent, _, attribute = names[0].rpartition(".")
    tensor = getattr(model.get_submodule(parent), attribute)
    for other in names[1:]:
        parent, _, attribute = other.rpartition(".")
        setattr(model.get_submodule(parent), attribute, tensor)


def _dimensions(group: ChannelGroup) -> dict[str, dict[int, Member]]:
    """Return parameter -> dimension -> one of the members that describe it."""
    result: dict[str, dict[int, Member]] = {}
    for member in group.members:
        result.setdefault(member.parameter, {})[member.dim] = member
    return result
