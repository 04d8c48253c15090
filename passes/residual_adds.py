"""Adds that join a value with something computed from that very value, and chains of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from .axes import axes_of
from .axis_flow import operator_name, tensor_nodes, tensors_of
from .axis_terms import Axis, atoms
from .facts import facts_of
from .program import Program, shape_of

_ADDS = ("add", "add_")
_CASTS = ("to", "_to_copy", "type_as", "contiguous", "clone", "alias")


@dataclass(frozen=True)
class ResidualAdd:
    """An add, the value it starts from, and the adds and casts on the way of that value to it."""

    entry: fx.Node
    add: fx.Node
    path: tuple[fx.Node, ...]


class ResidualAdds:
    """One analysis of a graph, with its transitive dependencies as bit sets."""

    def __init__(self, program: Program) -> None:
        """Collect what every node depends on; O(nodes^2) bits."""
        self._axes = axes_of(program)
        self._facts = facts_of(program)
        self._order = list(program.graph.nodes)
        self._bits = {node: 1 << index for index, node in enumerate(self._order)}
        self._before: dict[fx.Node, int] = {}
        for node in self._order:
            found = self._bits[node]
            for source in tensor_nodes(node):
                found |= self._before[source]
            self._before[node] = found

    def chains(self) -> list[list[ResidualAdd]]:
        """Return the residual adds, those on one stream together, in graph order."""
        found = [self._residual(node) for node in self._order if _is_add(node)]
        return self._linked(self._without_nested([item for item in found if item is not None]))

    def between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """Return the nodes on all paths between two nodes, both left out, in graph order."""
        ends = self._before[end]
        return [
            node
            for node in self._order
            if ends & self._bits[node]
            and node is not start
            and node is not end
            and self.depends(node, start)
        ]

    def depends(self, node: fx.Node, source: fx.Node) -> bool:
        """Say whether a value depends on another one."""
        return bool(self._before[node] & self._bits[source])

    def _residual(self, add: fx.Node) -> ResidualAdd | None:
        left, right = tensor_nodes(add)
        for skip, other in ((left, right), (right, left)):
            for entry, path in _skips(skip):
                if entry.op == "get_attr" or not self.depends(other, entry):
                    continue
                if self._facts.cost(self.between(entry, add)).flops:
                    return ResidualAdd(entry, add, path)
                break
        return None

    def _without_nested(self, found: list[ResidualAdd]) -> list[ResidualAdd]:
        """Keep one add of each nest.

        The adds of parallel branches (`x + f(x) + g(x)`) are one region. A region with one
        residual add inside (an adapter) swallows it; one around several is a skip over a whole
        chain, and the chain is kept.
        """
        on_path = {node for item in found for node in item.path}
        found = [item for item in found if item.add not in on_path]
        inside = {
            outer.add: [
                inner
                for inner in found
                if inner is not outer
                and self.depends(outer.add, inner.add)
                and (inner.entry is outer.entry or self.depends(inner.entry, outer.entry))
            ]
            for outer in found
        }
        found = [item for item in found if len(inside[item.add]) < 2]
        swallowed = {inner.add for item in found for inner in inside[item.add]}
        return [item for item in found if item.add not in swallowed]

    def _linked(self, found: Sequence[ResidualAdd]) -> list[list[ResidualAdd]]:
        chains: dict[fx.Node, list[ResidualAdd]] = {}
        for item in found:
            ends = [end for end in chains if self._leads_to(end, item.entry)]
            chain = chains.pop(ends[-1]) if ends else []
            chains[item.add] = [*chain, item]
        return sorted(chains.values(), key=lambda chain: self._bits[chain[0].add])

    def _leads_to(self, end: fx.Node, entry: fx.Node) -> bool:
        """Say whether only element-wise work, norms and reshapes lie between two values."""
        if not self.depends(entry, end) or self._layout(end) != self._layout(entry):
            return False
        return not self._facts.cost([*self.between(end, entry), entry]).flops

    def _layout(self, node: fx.Node) -> list[Axis]:
        return [axis for term in self._axes.term(node) for axis in atoms(term)]


def _is_add(node: fx.Node) -> bool:
    """Say whether a node adds two computed tensors of one shape."""
    if node.op != "call_function" or operator_name(node) not in _ADDS:
        return False
    operands = tensor_nodes(node)
    return (
        len(operands) == 2
        and len(shape_of(node)) >= 2
        and all(item.op != "get_attr" for item in operands)
        and all(shape_of(item) == shape_of(node) for item in operands)
        and all(value.is_floating_point() for value in tensors_of(node.meta["val"]))
    )


def _skips(start: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """Yield values that reach an add unchanged but for casts and other adds, nearest first."""
    queue: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(start, ())]
    seen = {start}
    while queue:
        node, path = queue.pop(0)
        yield node, path
        if _is_add(node) or (node.op == "call_function" and operator_name(node) in _CASTS):
            for source in tensor_nodes(node)[:2]:
                if source not in seen and shape_of(source) == shape_of(node):
                    seen.add(source)
                    queue.append((source, (*path, node)))
