"""Rewriting a graph so that a part of it runs at the demanded tokens only."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.kernels.token_positions import causal_mask_at, causal_mask_of, take_position

from .axis_flow import arguments_of, operator_name, tensor_nodes
from .demand import Demand
from .packing import size_argument
from .program import Program

_SELECT = torch.ops.aten.select.int
_SIZE = torch.ops.aten.sym_size.int
_SLICE = torch.ops.aten.slice.Tensor
_END = 2**63 - 1


def run_demanded(program: Program, demand: Demand) -> None:
    """Let the nodes of a demand run at its positions only; edits the graph in place."""
    _Rewriting(program, demand).run()
    program.changed()


class _Rewriting:
    def __init__(self, program: Program, demand: Demand) -> None:
        self._graph = program.graph
        self._demand = demand
        self._cut: dict[tuple[fx.Node, int], fx.Node] = {}

    def run(self) -> None:
        """Cut the operands from elsewhere, then let the readers take what is left."""
        if self._demand.positions.index is not None:
            self._move_first(self._demand.positions.index)
        for node in self._demand.nodes:
            before = tensor_nodes(node)
            for source, dim in self._demand.operands[node].items():
                node.replace_input_with(source, self._taken(source, dim, node))
            if node.op == "call_function":
                self._resize(node, before)
                if operator_name(node) == "scaled_dot_product_attention":
                    self._mask_causally(node)
        for reader in self._demand.readers:
            self._read(reader)

    def _move_first(self, index: fx.Node) -> None:
        """Move what the positions are computed from before the nodes that need them."""
        first = self._demand.nodes[0]
        needed, pending = {index}, [index]
        while pending:
            for item in pending.pop().all_input_nodes:
                if item not in needed:
                    needed.add(item)
                    pending.append(item)
        behind = False
        for node in list(self._graph.nodes):
            behind = behind or node is first
            if behind and node in needed:
                first.prepend(node)

    def _taken(self, source: fx.Node, dim: int, user: fx.Node) -> fx.Node:
        """Return the demanded tokens of a value; made once, before its first reader."""
        if (source, dim) not in self._cut:
            positions = self._demand.positions
            with self._graph.inserting_before(user):
                if positions.index is None:
                    stop = _END if positions.stop is None else positions.stop
                    new = self._graph.call_function(
                        _SLICE, (source, dim, positions.start or 0, stop)
                    )
                else:
                    new = self._graph.call_function(
                        take_position, (source, positions.index, 0, dim)
                    )
            self._cut[source, dim] = _scoped(new, user)
        return self._cut[source, dim]

    def _resize(self, node: fx.Node, before: list[fx.Node]) -> None:
        """Let a view ask for as many tokens as its operand has now."""
        found = size_argument(node)
        if found is None:
            return
        name, first = found
        sizes = list(arguments_of(node)[name])
        at = self._demand.dims[node] - first
        if not 0 <= at < len(sizes) or (sizes[at] == -1 and sizes.count(-1) == 1):
            return
        source = before[0]
        dim = self._demand.operands[node].get(source, self._demand.dims.get(source))
        assert dim is not None
        source = self._cut.get((source, dim), source)
        with self._graph.inserting_before(node):
            size = _scoped(self._graph.call_function(_SIZE, (source, dim)), node)
        sizes[at] = size
        position = [item.name for item in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
        if position < len(node.args):
            node.update_arg(position, sizes)
        else:
            node.update_kwarg(name, sizes)

    def _mask_causally(self, node: fx.Node) -> None:
        """Replace the causal flag, which counts queries from the first key, by a mask."""
        arguments = arguments_of(node)
        if arguments["is_causal"] is not True:
            return
        positions, key = self._demand.positions, arguments["key"]
        mask: Any = None
        if positions.index is not None or (positions.start, positions.stop) != (-1, None):
            with self._graph.inserting_before(node):
                if positions.index is not None:
                    mask = self._graph.call_function(causal_mask_at, (key, positions.index))
                else:
                    stop = None if positions.stop in (None, _END) else positions.stop
                    mask = self._graph.call_function(causal_mask_of, (key, positions.start, stop))
            _scoped(mask, node)
        query, value, rate = (arguments[name] for name in ("query", "value", "dropout_p"))
        node.args = (query, key, value, mask, rate, False)
        node.kwargs = {n: v for n, v in node.kwargs.items() if n in ("scale", "enable_gqa")}

    def _read(self, reader: fx.Node) -> None:
        """Let a reader take the tokens from a value that has no others."""
        source, dim = self._demand.source, self._demand.dims[self._demand.source]
        if operator_name(reader) == "slice":
            reader.replace_all_uses_with(source)
        else:
            with self._graph.inserting_before(reader):
                new = _scoped(self._graph.call_function(_SELECT, (source, dim, 0)), reader)
            reader.replace_all_uses_with(new)
        self._graph.erase_node(reader)


def _scoped(new: fx.Node, like: fx.Node) -> fx.Node:
    new.meta = {"modules": like.meta["modules"], "calls": like.meta["calls"]}
    return new
