"""Which nodes of a program run on the rows of real tokens only, and what crosses the border.

Rowwise nodes (see `row_places`) that belong together and do real work are packed. Views at the
border stay outside, so that what is put back or taken out lies as the layers wrote it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import fx

from .axis_flow import arguments_of, operator_name, tensor_nodes, tensors_of
from .facts import facts_of
from .program import Program, shape_of
from .row_mixing import filled
from .row_places import Place, RowPlaces

Kind = Literal["rows", "table", "samples"]
"""What an operand from outside has: samples and tokens, only tokens, or only samples."""

_ATTENTION = "scaled_dot_product_attention"
_UNSIZED = ("squeeze", "view_as_complex", "unfold")
"""Operators whose result has other dimensions where there is one sample."""


@dataclass(frozen=True)
class Packing:
    """The part of a program that runs packed.

    Attributes:
        places: Where rows lie.
        nodes: The packed nodes in graph order.
        attentions: Those of them that are attentions: whether they hide later tokens too.
        flops: Forward operations of those that work on every token alone, at the example's sizes.
        attention_flops: Forward operations of the attentions.
    """

    places: RowPlaces
    nodes: tuple[fx.Node, ...]
    attentions: Mapping[fx.Node, bool]
    flops: int
    attention_flops: int

    def entries(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Yield every operand with rows that comes from outside, with the packed node."""
        inside = set(self.nodes)
        for node in self.nodes:
            for source in packed_operands(node):
                if source not in inside and self.places.has_rows(source):
                    yield source, node


def packed_operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands of a packed node that are packed.

    An attention keeps its mask, and what a join puts before or after a value is empty.
    """
    operands = tensor_nodes(node)
    if operator_name(node) == _ATTENTION:
        return operands[:3]
    return filled(operands) if operator_name(node) == "cat" else operands


def packing_of(
    program: Program,
    places: RowPlaces,
    within: Collection[fx.Node] | None = None,
    attentions: Mapping[fx.Node, bool] = MappingProxyType({}),
) -> Packing:
    """Choose the nodes of a program that run on real tokens only; none if that brings nothing.

    Args:
        program: The program.
        places: Where its rows lie.
        within: The nodes to choose from; None for all.
        attentions: Attentions that hide padding only (False), or later tokens too (True).
    """
    choice = _Choice(program, places, attentions)
    if within is not None:
        choice.inside.intersection_update(within)
    choice.refuse()
    choice.keep_working()
    choice.trim()
    choice.refuse()
    choice.keep_working()
    nodes = tuple(node for node in program.graph.nodes if node in choice.inside)
    costs = {node: facts_of(program).nodes[node].forward_flops for node in nodes}
    packed = {node: kind for node, kind in attentions.items() if node in costs}
    attention_flops = sum(costs[node] for node in packed)
    return Packing(places, nodes, packed, sum(costs.values()) - attention_flops, attention_flops)


def entry_kind(places: RowPlaces, source: fx.Node, user: fx.Node) -> Kind | None:
    """Return how an operand from outside is packed for a node, None if it cannot be."""
    place, wanted = places.place(source), places.place(user)
    if place is None or wanted is None:
        return None
    if place.batch is not None and place.token is not None:
        return "rows" if is_plain(places, source, place) else None
    if place.batch is None:
        return "table" if is_plain(places, source, place) else None
    if wanted.merged or not _is_pointwise(user) or not is_plain(places, source, place):
        return None
    at = _sample_token_dim(source, user, wanted)
    return "samples" if at >= 0 and shape_of(source)[at] == 1 else None


def sample_token_dim(places: RowPlaces, source: fx.Node, user: fx.Node) -> int:
    """Return the dimension of size 1 where an operand without tokens is aligned with those."""
    wanted = places.place(user)
    assert wanted is not None
    return _sample_token_dim(source, user, wanted)


def _sample_token_dim(source: fx.Node, user: fx.Node, wanted: Place) -> int:
    assert wanted.token is not None
    value = next(iter(tensors_of(user.meta["val"])))
    return wanted.token - (value.dim() - len(shape_of(source)))


def is_plain(places: RowPlaces, node: fx.Node, place: Place) -> bool:
    """Say whether the dimensions of a place are just samples and tokens, nothing inside."""
    shape = shape_of(node)
    if place.merged:
        assert place.batch is not None
        return not place.token_first and shape[place.batch] == places.batch * places.tokens
    return (place.batch is None or shape[place.batch] == places.batch) and (
        place.token is None or shape[place.token] == places.tokens
    )


def _is_pointwise(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    )


class _Choice:
    def __init__(
        self, program: Program, places: RowPlaces, attentions: Mapping[fx.Node, bool]
    ) -> None:
        self._program = program
        self._places = places
        self.attentions = attentions
        self._facts = facts_of(program)
        self.inside: set[fx.Node] = set()
        for node in program.graph.nodes:
            if self._can_be_packed(node):
                self.inside.add(node)

    def _can_be_packed(self, node: fx.Node) -> bool:
        place = self._places.place(node)
        if place is None or place.batch is None or place.token is None:
            return False
        if node in self.attentions:
            return all(self._is_headed(item) for item in (*packed_operands(node), node))
        if not self._places.rowwise(node):
            return False
        values = tensors_of(node.meta["val"])
        if not all(value.is_floating_point() for value in values):
            return False
        if node.op == "call_module":
            return True
        if operator_name(node).rstrip("_") in _UNSIZED:
            return False
        if _writes(node):
            return all(len(source.users) == 1 for source in tensor_nodes(node)[:1])
        return True

    def _is_headed(self, node: fx.Node) -> bool:
        """Say whether a value is [batch, head, token, width]."""
        place = self._places.place(node)
        return place == Place(0, 2) and is_plain(self._places, node, place)

    def refuse(self) -> None:
        """Take out what has operands that cannot be packed, or results that cannot be put back."""
        while refused := [node for node in self.inside if not self._crosses_well(node)]:
            for node in refused:
                self.inside.difference_update(self._unit(node))

    def _crosses_well(self, node: fx.Node) -> bool:
        for source in packed_operands(node):
            if source in self.inside or not self._places.has_rows(source):
                continue
            if node in self.attentions:
                return False  # nothing is saved by packing for it
            if entry_kind(self._places, source, node) is None:
                return False
        if all(user in self.inside for user in node.users):
            return True
        place = self._places.place(node)
        assert place is not None
        single = isinstance(node.meta["val"], torch.Tensor)
        return single and is_plain(self._places, node, place)

    def _unit(self, node: fx.Node) -> list[fx.Node]:
        """Return an operator with several results together with these."""
        if node.target is operator.getitem:
            (source,) = node.all_input_nodes
            return [source, *source.users]
        if not isinstance(node.meta["val"], torch.Tensor):
            return [node, *node.users]
        return [node]

    def keep_working(self) -> None:
        """Take out connected parts that cost no operations."""
        seen: set[fx.Node] = set()
        for start in list(self.inside):
            if start in seen:
                continue
            part, pending = {start}, [start]
            while pending:
                node = pending.pop()
                readers = (user for user in node.users if node in packed_operands(user))
                for other in (*packed_operands(node), *readers):
                    if other in self.inside and other not in part:
                        part.add(other)
                        pending.append(other)
            seen |= part
            if not any(self._facts.nodes[node].forward_flops for node in part):
                self.inside -= part

    def trim(self) -> None:
        """Leave views outside where they only follow, or only precede, what is packed."""
        order = list(self._program.graph.nodes)
        for node in reversed(order):
            if node.target is not operator.getitem:
                self._leave(node, ends=True)
        for node in order:
            if node.target is not operator.getitem:
                self._leave(node, ends=False)

    def _leave(self, node: fx.Node, *, ends: bool) -> None:
        """Leave a view, with its results, outside if nothing packed lies on that side of it."""
        if node not in self.inside or not self._is_view(node):
            return
        unit = self._unit(node)
        neighbours = _readers(unit) if ends else tensor_nodes(node)
        if any(other in self.inside for other in neighbours):
            return
        if ends:
            crossing = [item for item in tensor_nodes(node) if item in self.inside]
            places = [(item, self._places.place(item)) for item in crossing]
        else:
            places = [(item, self._places.place(item)) for item in unit if item.users]
            places = [pair for pair in places if isinstance(pair[0].meta["val"], torch.Tensor)]
        if all(place and is_plain(self._places, item, place) for item, place in places):
            self.inside.difference_update(unit)

    def _is_view(self, node: fx.Node) -> bool:
        """Say whether a node only looks at its operand in another way."""
        return node.op == "call_function" and not self._facts.nodes[node].written_bytes


def _readers(unit: Iterable[fx.Node]) -> list[fx.Node]:
    members = set(unit)
    return [user for node in members for user in node.users if user not in members]


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def size_argument(node: fx.Node) -> tuple[str, int] | None:
    """Return the argument of a view that lists sizes, and the first dimension that it sizes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    arguments = arguments_of(node)
    for name in ("size", "shape", "sizes"):
        if isinstance(arguments.get(name), (list, tuple)):
            first = arguments["dim"] if operator_name(node) == "unflatten" else 0
            return name, first % value_rank(node)
    return None


def value_rank(node: fx.Node) -> int:
    """Return the number of dimensions of a tensor node."""
    return len(shape_of(node))
