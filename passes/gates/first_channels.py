"""Coupled channels of which a net can compute the first alone: what that cuts, and its trial."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from graphopt.kernels.depth_gate import is_untrained
from graphopt.kernels.width_gate import WidthGate
from graphopt.passes.axes import ChannelGroup
from graphopt.passes.base import Context, set_tensor, shared_names
from graphopt.passes.facts import attribute_of
from graphopt.passes.program import Program
from graphopt.passes.snapshot import twin_of
from graphopt.passes.verifier import preserved, relative_error, rounding_bound


@dataclass(frozen=True)
class FirstChannels:
    """The first channels of some groups.

    Attributes:
        cuts: Per tensor how many indices of a dimension belong to them.
        reads: For the parameters that read channels the dimensions in which they do.
    """

    cuts: Mapping[str, Mapping[int, int]]
    reads: Mapping[str, tuple[int, ...]]


def first_channels(counts: Iterable[tuple[ChannelGroup, int]]) -> FirstChannels:
    """Return what groups hold of their first channels, so many of each."""
    cuts: dict[str, dict[int, int]] = {}
    reads: dict[str, dict[int, None]] = {}
    for group, count in counts:
        for member in group.members:
            cut = len(member.indices(range(count)))
            cuts.setdefault(member.parameter, {})[member.dim] = cut
            if member.role == "consumer":
                reads.setdefault(member.parameter, {})[member.dim] = None
    return FirstChannels(cuts, {name: tuple(dims) for name, dims in reads.items()})


def calls_of(program: Program, groups: Iterable[ChannelGroup]) -> list[fx.Node]:
    """Return the calls of the layers that hold channels of groups, in graph order."""
    nodes = {node for group in groups for member in group.members for node in member.nodes}
    return [node for node in program.graph.nodes if node in nodes]


def form_refusal(program: Program, group: ChannelGroup, count: int) -> str | None:
    """Say why the first channels of a group cannot be computed alone, None if nothing is known."""
    if group.reasons:
        return group.reasons[0]
    if count >= group.size:
        return f"all {group.size} channels are needed"
    for member in group.members:
        name = member.parameter
        cut = member.indices(range(count))
        if cut != list(range(len(cut))):
            return f"its channels do not lie side by side in {name}"
        for node in member.nodes:
            if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
                return f"{name} is read outside of a layer of one input"
            if len(program.calls(str(node.target))) > 1:
                return f"{node.target} is called more than once"
            if _gated(program, node):
                return "it has a gate already"
        if len(shared_names(program.model, name)) > 1:
            return f"{name} is tied to another parameter"
    return None


def training_refusal(program: Program, group: ChannelGroup, context: Context) -> str | None:
    """Say why all channels of a group must take part from the beginning, None if they need not."""
    names = list(dict.fromkeys(member.parameter for member in group.members))
    pattern = context.ignored_by(*names)
    if pattern is not None:
        return f"ignored by the pattern {pattern!r}"
    values = [attribute_of(program, name) for name in names]
    if any(value.is_meta for value in values):
        return "parameters on the meta device have no values that show whether they were trained"
    parameters = [
        (name, value)
        for name, value in zip(names, values, strict=True)
        if isinstance(value, nn.Parameter)
    ]
    frozen = next((name for name, value in parameters if not value.requires_grad), None)
    if frozen is not None:
        return f"{frozen} is not trained"
    if not is_untrained([value for _, value in parameters]):
        return "its weights were trained: none of its parameters has the same value everywhere"
    return None


def trial_refusal(program: Program, first: FirstChannels) -> str | None:
    """Say what goes wrong if first channels are computed alone, None if nothing does.

    It is tried on a few rows: the result must be that of all channels where the later ones are not
    read. A norm over the channels, or a size written into the graph, makes a difference.
    """
    unread = {name: _unread(program, name, first) for name in first.reads}
    cut = {
        name: _cut(attribute_of(program, name).detach(), dims) for name, dims in first.cuts.items()
    }
    expected = _outputs(program, unread)
    try:
        found = _outputs(program, {**cut, **{n: _cut(unread[n], first.cuts[n]) for n in unread}})
    except (RuntimeError, ValueError, IndexError) as error:
        return f"the model fails on fewer channels: {str(error).splitlines()[0]}"
    bound = rounding_bound(program)
    for value, reference in zip(found, expected, strict=True):
        if relative_error(value, reference) > bound:
            return "with fewer channels the model computes something else"
    return None


def _gated(program: Program, node: fx.Node) -> bool:
    return any(
        user.op == "call_module" and isinstance(program.module(str(user.target)), WidthGate)
        for user in node.users
    )


def _unread(program: Program, name: str, first: FirstChannels) -> torch.Tensor:
    value: torch.Tensor = attribute_of(program, name).detach().clone()
    for dim in first.reads[name]:
        kept = first.cuts[name][dim]
        value.narrow(dim, kept, value.shape[dim] - kept).zero_()
    return value


def _cut(value: torch.Tensor, dims: Mapping[int, int]) -> torch.Tensor:
    for dim, kept in dims.items():
        value = value.narrow(dim, 0, kept)
    return value.contiguous()


def _outputs(program: Program, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs in evaluation mode with other tensors; the program keeps its own."""
    twin = twin_of(program)
    for name, value in tensors.items():
        set_tensor(twin.model, name, value)
    with preserved(twin.model), torch.no_grad():
        twin.model.eval()
        outputs = twin.run(*twin.few_rows())
    return [value for value in outputs if isinstance(value, torch.Tensor)]
