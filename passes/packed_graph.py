"""Rewriting a graph so that a part of it runs on the rows of real tokens only."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.kernels.packed_attention import packed_attention, sample_starts
from graphopt.kernels.packed_rows import (
    pack_rows,
    pack_samples,
    pack_table,
    real_rows,
    unpack_rows,
)

from .axis_flow import arguments_of, operator_name, tensor_nodes
from .packing import Packing, entry_kind, packed_operands, sample_token_dim, size_argument
from .program import Program, shape_of
from .propagation import note_rows
from .row_mixing import filled
from .row_places import Place

_SYM_SIZE = torch.ops.aten.sym_size.int


def run_packed(
    program: Program,
    packing: Packing,
    mask: fx.Node,
    *,
    marks_real: bool,
    rows: int,
    select: Callable[[torch.Tensor, bool], torch.Tensor] = real_rows,
) -> None:
    """Let the nodes of a packing run on real tokens; edits the graph in place.

    The index of real tokens is computed once, at the start; a value is packed where it is made
    and put back where it is made, so both belong to the block that makes it.

    Args:
        program: The program.
        packing: What to pack.
        mask: The padding mask, an input or what stands right after the inputs.
        marks_real: Whether the mask is non-zero at real tokens.
        rows: Number of real tokens in the example: the count that costs are told for.
        select: Makes the index from the mask and `marks_real`.
    """
    index = _Rewriting(program, packing, mask, marks_real, rows, select).run()
    _let_views_copy(program.graph, index)
    program.changed()


def is_packed(program: Program) -> bool:
    """Say whether a program runs on real tokens already."""
    return any(node.target is real_rows for node in program.graph.nodes)


def _let_views_copy(graph: fx.Graph, source: fx.Node) -> None:
    """Turn views of what depends on a node into reshapes.

    Rows that are put back lie in memory by sample and token, whatever the order was before.
    """
    after = {source}
    for node in graph.nodes:
        if after.intersection(node.all_input_nodes):
            after.add(node)
            if node.target is torch.ops.aten.view.default:
                node.target = torch.ops.aten.reshape.default


class _Rewriting:
    def __init__(
        self,
        program: Program,
        packing: Packing,
        mask: fx.Node,
        marks_real: bool,
        rows: int,
        select: Callable[[torch.Tensor, bool], torch.Tensor],
    ) -> None:
        self._graph = program.graph
        self._packing = packing
        self._places = packing.places
        self._inside = set(packing.nodes)
        self._mask = mask
        self._packed: dict[tuple[fx.Node, str, int], fx.Node] = {}
        start = mask if mask.op != "placeholder" else program.placeholders[-1]
        scope = {"modules": ("",), "calls": ("",)}
        with self._graph.inserting_after(start):
            self._index = self._graph.call_function(select, (mask, marks_real))
        self._index.meta = dict(scope)
        note_rows(program, self._index, rows)
        with self._graph.inserting_after(self._index):
            self._count = self._graph.call_function(_SYM_SIZE, (self._index, 0))
        self._count.meta = {**scope, "val": self._index.meta["val"].shape[0]}
        self._begin = self._count
        if packing.attentions:
            with self._graph.inserting_after(self._count):
                self._begin = self._graph.call_function(sample_starts, (mask, marks_real))
            self._begin.meta = dict(scope)

    def run(self) -> fx.Node:
        """Rewrite node after node; return the index of real tokens."""
        readers = {
            node: [user for user in node.users if user not in self._inside]
            for node in self._packing.nodes
        }
        kinds = {
            (source, node): entry_kind(self._places, source, node)
            for source, node in self._packing.entries()
        }
        for node in self._packing.nodes:
            self._resize(node)
            for source in packed_operands(node):
                if (source, node) in kinds:
                    kind = kinds[source, node]
                    assert kind is not None
                    node.replace_input_with(source, self._taken(source, node, kind))
        for node, users in readers.items():
            if users:
                self._put_back(node, users)
        self._skip_whole()
        for node, ordered in self._packing.attentions.items():
            self._attend(node, ordered)
        return self._index

    def _taken(self, source: fx.Node, node: fx.Node, kind: str) -> fx.Node:
        """Return the packed value of an operand from outside."""
        place = self._places.place(source)
        assert place is not None
        at = sample_token_dim(self._places, source, node) if kind == "samples" else -1
        key = (source, kind, at)
        if key not in self._packed:
            inner = source.op in ("placeholder",)
            with self._graph.inserting_after(self._begin if inner else self._after(source)):
                if kind == "rows":
                    arguments: tuple[Any, ...] = (source, self._index, place.batch, place.token)
                    new = self._graph.call_function(pack_rows, arguments)
                elif kind == "table":
                    arguments = (source, self._index, self._mask, place.token)
                    new = self._graph.call_function(pack_table, arguments)
                else:
                    arguments = (source, self._index, self._mask, place.batch, at)
                    new = self._graph.call_function(pack_samples, arguments)
            self._packed[key] = _scoped(new, source)
        return self._packed[key]

    def _after(self, source: fx.Node) -> fx.Node:
        """Return the node after which a source and the index are both there."""
        order = {node: number for number, node in enumerate(self._graph.nodes)}
        return max(source, self._begin, key=order.__getitem__)

    def _put_back(self, node: fx.Node, users: list[fx.Node]) -> None:
        """Give the readers of a packed value that are not packed the padded one."""
        place = self._place(node)
        with self._graph.inserting_after(node):
            new = self._graph.call_function(
                unpack_rows, (node, self._index, self._mask, place.batch, place.token)
            )
        _scoped(new, node)
        for user in users:
            user.replace_input_with(node, new)

    def _attend(self, node: fx.Node, ordered: bool) -> None:
        """Let an attention run among the real tokens of each sample."""
        arguments = (*arguments_of(node).values(), self._index, self._begin, self._mask, ordered)
        node.target = packed_attention
        node.args, node.kwargs = arguments, {}

    def _place(self, node: fx.Node) -> Place:
        place = self._places.place(node)
        assert place is not None
        return place

    def _resize(self, node: fx.Node) -> None:
        """Let a view ask for one sample of all real tokens."""
        found = size_argument(node)
        if found is None:
            return
        name, first = found
        arguments = arguments_of(node)
        shape, place = shape_of(node), self._place(node)
        sizes = list(arguments[name])
        for position in range(len(sizes)):
            dim = first + position
            if dim == place.token:
                inner = shape[dim] // self._places.tokens
                if place.merged:
                    inner //= self._places.batch
                sizes[position] = self._times(node, inner)
            elif dim == place.batch:
                sizes[position] = shape[dim] // self._places.batch
            elif sizes[position] == -1 and operator_name(node) not in ("expand", "broadcast_to"):
                sizes[position] = shape[dim]
        index = [item.name for item in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
        if index < len(node.args):
            node.update_arg(index, sizes)
        else:
            node.update_kwarg(name, sizes)

    def _times(self, node: fx.Node, inner: int) -> fx.Node:
        """Return the number of real tokens times what each has in a merged dimension."""
        if inner == 1:
            return self._count
        with self._graph.inserting_before(node):
            new = self._graph.call_function(operator.mul, (self._count, inner))
        return _scoped(new, node)

    def _skip_whole(self) -> None:
        """Leave out what changes nothing but may name the number of tokens or samples.

        A slice that keeps all of them, and a join with something empty (an empty cache).
        """
        for node in self._packing.nodes:
            if node.op != "call_function" or operator_name(node) not in ("slice", "narrow", "cat"):
                continue
            place, arguments = self._place(node), arguments_of(node)
            if arguments["dim"] % len(shape_of(node)) in (place.batch, place.token):
                (source,) = filled(arguments.get("tensors", tensor_nodes(node)[:1]))
                node.replace_all_uses_with(source)
                self._graph.erase_node(node)


def _scoped(new: fx.Node, like: fx.Node) -> fx.Node:
    new.meta = {"modules": like.meta["modules"], "calls": like.meta["calls"]}
    return new
