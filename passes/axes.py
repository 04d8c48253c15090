"""Which dimensions of which parameters are one and the same axis, and which may shrink.

Removing a hidden unit, an attention head or a channel means removing the same units from every
parameter it runs through: producers, biases, norms, and the consumers that contract it. `axes_of`
finds these coupled groups by dataflow, from the operators in the graph alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from .axis_flow import Flow, Role, Site, Terms, Use
from .axis_terms import Axis, atoms, normal, owners, repeats, size_of
from .axis_walk import walk
from .errors import PlanError
from .program import Program


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer that holds units of an axis.

    A parameter dimension that is used in two ways is two members; slice it once.

    Attributes:
        parameter: Name in the model; tied ones appear under the first name the graph uses.
        dim: The dimension.
        role: "producer" (a contraction's output), "consumer" (contracted), "pointwise" (bias,
            norm, depthwise), "lookup" (an embedding's width) or "buffer".
        owners: For every index along the dimension the unit it belongs to, -1 for none.
        nodes: The nodes of the graph that use the parameter in this role.
        inputs: For a consumer, per node the node whose value is contracted, and its dimension.
    """

    parameter: str
    dim: int
    role: Role
    owners: tuple[int, ...]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[tuple[fx.Node, int], ...] = ()

    def indices(self, kept: Iterable[int]) -> list[int]:
        """Return the indices along the dimension that remain when only `kept` units do."""
        wanted = {-1, *kept}
        return [index for index, owner in enumerate(self.owners) if owner in wanted]

    def units(self) -> list[list[int]]:
        """Return, unit by unit, the indices along the dimension that belong to it."""
        result: list[list[int]] = [[] for _ in range(max(self.owners) + 1)]
        for index, owner in enumerate(self.owners):
            if owner >= 0:
                result[owner].append(index)
        return result

    def reordered(self, order: Sequence[int]) -> list[int]:
        """Return, for every index along the dimension, the one that comes there.

        Args:
            order: The unit that comes at every place; all units have equally many indices here.
        """
        result = list(range(len(self.owners)))
        units = self.units()
        for place, unit in zip(units, order, strict=True):
            for target, source in zip(place, units[unit], strict=True):
                result[target] = source
        return result


@dataclass(frozen=True)
class ChannelGroup:
    """An axis that runs through parameters.

    Attributes:
        axis: Its number in the analysis it comes from.
        key: A name that the same graph always gives it: parameter, dimension, first index and
            distance of the units.
        size: How many units it has.
        kind: "heads", "head dimension", "channels" or "hidden units", from how it is used.
        members: Everything that must be sliced together.
        reasons: Why units cannot be removed; empty if they can.
        placed: Whether units have a place of their own, so that they cannot be put in another
            order; if not, the program computes the same in any, up to the order of sums.
    """

    axis: int
    key: str
    size: int
    kind: str
    members: tuple[Member, ...]
    reasons: tuple[str, ...]
    placed: bool

    @property
    def prunable(self) -> bool:
        """Whether units can be removed."""
        return not self.reasons

    def of(self, role: Role) -> tuple[Member, ...]:
        """Return the members with a role."""
        return tuple(member for member in self.members if member.role == role)


class Axes:
    """The terms of a program's tensors, and its groups of coupled dimensions."""

    def __init__(self, program: Program, flow: Flow) -> None:
        """Hold the result of a walk; groups are found on demand."""
        self._program = program
        self._flow = flow
        self._groups: tuple[ChannelGroup, ...] | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The static sizes in the graph and what they count."""
        return tuple(self._flow.sites)

    @property
    def splits(self) -> tuple[tuple[fx.Node, int, Terms, str], ...]:
        """The nodes that cut a dimension: node, dimension, parts, innermost module."""
        return tuple(self._flow.splits)

    @property
    def nodes(self) -> dict[fx.Node, Terms | list[Terms]]:
        """All nodes, also those inside leaf modules, with their terms."""
        return self._flow.terms

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters and buffers in the graph."""
        return tuple(self._flow.parameters)

    def term(self, node: fx.Node) -> Terms:
        """Return the terms of a tensor node, one per dimension."""
        return tuple(normal(item) for item in self._flow.dims(node))

    def parameter(self, name: str) -> Terms:
        """Return the terms of a parameter or buffer, one per dimension.

        Raises:
            PlanError: if the graph does not use it.
        """
        if name not in self._flow.parameters:
            raise PlanError(f"the graph uses no parameter or buffer {name!r}")
        return tuple(normal(item) for item in self._flow.parameters[name])

    def sizes_with(self, node: fx.Node, dim: int, sizes: Mapping[int, int]) -> int:
        """Return the size of a dimension when axes, by number, have other sizes."""
        return size_of(self._flow.dims(node)[dim], sizes)

    def groups(self) -> tuple[ChannelGroup, ...]:
        """Return all axes that some parameter produces or consumes, in graph order."""
        if self._groups is None:
            self._groups = tuple(_groups(self._program, self._flow))
        return self._groups

    def group(self, key: str) -> ChannelGroup:
        """Return the group with a key.

        Raises:
            PlanError: if there is none.
        """
        for group in self.groups():
            if group.key == key:
                return group
        raise PlanError(f"this model has no group of channels {key!r}; is the plan for another?")


def axes_of(program: Program) -> Axes:
    """Return the axes of a program; analysed once per state of its graph."""

    def compute(current: Program) -> Axes:
        return Axes(current, walk(current))

    axes: Axes = program.fact("axes", compute)
    return axes


def _groups(program: Program, flow: Flow) -> Iterable[ChannelGroup]:
    reasons: dict[Axis, dict[str, None]] = {}
    for term, reason in flow.pins:
        for axis in atoms(term):
            reasons.setdefault(axis, {})[reason] = None
    members: dict[Axis, list[Member]] = {}
    roles = _Roles(program, flow)
    for name, dims in flow.parameters.items():
        for dim, term in enumerate(dims):
            for axis in dict.fromkeys(atoms(term)):
                members.setdefault(axis, []).extend(roles.members(name, dim, axis))
    kinds = _Kinds(flow)
    for axis, found in members.items():
        present = {member.role for member in found}
        if not present & {"producer", "consumer"} or not axis.size:
            continue
        why = list(reasons.get(axis, ()))
        if axis in roles.repeated:
            why.append("occurs twice in one dimension of a parameter")
        if axis.dynamic:
            why.append("has another size in every call")
        if "producer" not in present:
            why.append("is not produced by a parameter")
        if "consumer" not in present:
            why.append("is not consumed by a parameter")
        first = found[0]
        units = first.units()
        stride = units[1][0] - units[0][0] if len(units) > 1 else 0
        key = f"{first.parameter}/{first.dim}/{units[0][0]}/{stride}"
        placed = not flow.symmetric.issuperset(why) or not all(map(_is_uniform, found))
        kind = kinds.of(axis)
        yield ChannelGroup(axis.number, key, axis.size, kind, tuple(found), tuple(why), placed)


def _is_uniform(member: Member) -> bool:
    """Say whether all units have equally many indices, so that any can take any place."""
    sizes = Counter(member.owners)
    sizes.pop(-1, None)
    return len({*sizes.values()}) == 1 and len(sizes) == max(sizes) + 1


class _Roles:
    """What the dimensions of parameters are used for."""

    def __init__(self, program: Program, flow: Flow) -> None:
        self._flow = flow
        self._graph = program.graph
        self._buffers = {name for name, _ in program.model.named_buffers(remove_duplicate=False)}
        self._uses: dict[str, list[Use]] = {}
        self.repeated: set[Axis] = set()
        for use in flow.uses:
            self._uses.setdefault(use.name, []).append(use)

    def members(self, name: str, dim: int, axis: Axis) -> list[Member]:
        term = self._flow.parameters[name][dim]
        uses = [
            use
            for use in self._uses.get(name, ())
            if axis in atoms(use.term) and self._is_dimension(use, name, dim)
        ]
        of_units = tuple(owners(term, axis))
        if repeats(term, axis):
            self.repeated.add(axis)
        found: dict[Role, list[Use]] = {}
        for use in uses:
            found.setdefault(use.role, []).append(use)
        result = [
            Member(
                name,
                dim,
                role,
                of_units,
                tuple(dict.fromkeys(use.node for use in items)),
                tuple(dict.fromkeys(pair for use in items for pair in self._input(use, axis))),
            )
            for role, items in found.items()
        ]
        if not result:
            role: Role = "buffer" if name in self._buffers else "pointwise"
            result = [Member(name, dim, role, of_units, tuple(self._flow.users.get(name, ())))]
        return result

    def _is_dimension(self, use: Use, name: str, dim: int) -> bool:
        """Whether a use is of this very dimension, or of a weight computed from several."""
        dims = self._flow.parameters[name]
        return use.dim is dims[dim] or not any(use.dim is other for other in dims)

    def _input(self, use: Use, axis: Axis) -> list[tuple[fx.Node, int]]:
        if use.activation is None:
            return []
        node = use.activation
        if node.graph is not self._graph:
            node = use.node.all_input_nodes[0]
        dims = [i for i, term in enumerate(self._flow.dims(node)) if axis in atoms(term)]
        return [(node, dims[-1])] if dims else []


class _Kinds:
    """Neutral names for axes, from what runs over them."""

    def __init__(self, flow: Flow) -> None:
        self._inside = {axis for term in flow.head_dims for axis in atoms(term)}
        self._heads = {axis for term in flow.heads for axis in atoms(term)}
        self._channels = {axis for use in flow.uses if use.convolution for axis in atoms(use.term)}

    def of(self, axis: Axis) -> str:
        if axis in self._heads:
            return "heads"
        if axis in self._inside:
            return "head dimension"
        return "channels" if axis in self._channels else "hidden units"
