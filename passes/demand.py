"""Which tokens are read: positions that readers take, followed backwards through the program.

A reader takes some tokens of a value: the first one, the last one, the one before the padding. What
only such readers use, and computes every token on its own, is needed at those tokens only. So are
the queries of an attention, but not its keys and values: there the demand ends.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .axis_flow import arguments_of, operator_name, tensor_nodes
from .facts import facts_of
from .packing import is_plain, size_argument
from .program import Program, shape_of
from .row_mixing import mixed_dims
from .row_places import RowPlaces

_ATTENTION = "scaled_dot_product_attention"
_LOSSES = ("cross_entropy_loss", "nll_loss", "nll_loss_nd")
_SELECTED = ("select", "slice")
_MOVES = ("permute", "transpose", "t", "mT", "numpy_T", "adjoint", "movedim", "swapaxes")
"""Operators after which a dimension is at another place."""


@dataclass(frozen=True)
class Positions:
    """Which tokens a reader takes of every sample.

    Attributes:
        start: First position of a range, as in a slice; None from the beginning.
        stop: The position after its last, None to the end.
        index: A value [batch] with one position per sample, instead of a range.
    """

    start: Any = None
    stop: Any = None
    index: fx.Node | None = None


@dataclass(frozen=True)
class Demand:
    """A part of a program that is needed at some tokens only.

    Attributes:
        source: The value that is read.
        readers: Who takes the tokens of it.
        positions: Which.
        nodes: What is computed for them only, in graph order; `source` is the last.
        dims: For each of these nodes the dimension of its tokens (of its queries, for scores).
        operands: For each node its operands from elsewhere that are cut, with their dimension.
        saved_flops: Forward operations that are not needed, at the example's sizes.
    """

    source: fx.Node
    readers: tuple[fx.Node, ...]
    positions: Positions
    nodes: tuple[fx.Node, ...]
    dims: Mapping[fx.Node, int]
    operands: Mapping[fx.Node, Mapping[fx.Node, int]]
    saved_flops: int


def demands(program: Program, places: RowPlaces) -> list[Demand]:
    """Return the parts of a program of which readers take some tokens, with something to save."""
    found: list[Demand] = []
    for source in program.graph.nodes:
        readers = list(source.users)
        kinds = {_positions(places, source, reader) for reader in readers}
        if not readers or len(kinds) > 1 or None in kinds:
            continue
        (positions,) = kinds
        assert positions is not None
        demand = _Backwards(program, places, positions).from_(source)
        if demand is not None and demand.saved_flops > 0:
            found.append(demand)
    return found


@dataclass(frozen=True)
class LabelDemand:
    """A loss over rows of which it ignores some, and what is computed for the others only.

    Attributes:
        loss: The loss; its first operand has one row per token of every sample.
        target: The class of each row [batch*token].
        ignored: The class of rows that do not count.
        nodes: What only the loss, and outputs that nobody reads, use row by row.
    """

    loss: fx.Node
    target: fx.Node
    ignored: int
    nodes: frozenset[fx.Node]


def label_demands(program: Program, places: RowPlaces) -> list[LabelDemand]:
    """Return the losses of a program that read rows with a label only."""
    found: list[LabelDemand] = []
    for loss in program.graph.nodes:
        if loss.op != "call_function" or operator_name(loss) not in _LOSSES:
            continue
        arguments = arguments_of(loss)
        rows, target = arguments["self"], arguments["target"]
        place = places.place(rows)
        if place is None or not place.merged or not is_plain(places, rows, place):
            continue
        if place.batch != 0 or len(shape_of(rows)) != 2 or shape_of(target) != shape_of(rows)[:1]:
            continue
        if target.meta["val"].is_floating_point() or arguments["reduction"] == 0:
            continue
        needed = _ancestors([target])
        inside: set[fx.Node] = set()
        for node in reversed(program.graph.nodes):
            readers = [user for user in node.users if user not in (loss, *inside)]
            own = node.users and places.rowwise(node) and node not in needed
            if own and all(_is_unread(program, node, user) for user in readers):
                inside.add(node)
        if rows in inside:
            found.append(LabelDemand(loss, target, arguments["ignore_index"], frozenset(inside)))
    return found


def _is_unread(program: Program, node: fx.Node, user: fx.Node) -> bool:
    """Say whether a user is the end of the program, which returns a node for nobody."""
    if user is not program.result:
        return False
    (outputs,) = program.result.args
    assert isinstance(outputs, (tuple, list))
    return all(
        position in program.unread_outputs
        for position, output in enumerate(outputs)
        if output is node
    )


def _positions(places: RowPlaces, source: fx.Node, reader: fx.Node) -> Positions | None:
    """Return which tokens a reader takes of a value, None if it reads others, or all."""
    place = places.place(source)
    if place is None or place.token is None or place.batch != 0 or place.merged:
        return None
    if not isinstance(reader.target, torch._ops.OpOverload) or not is_plain(places, source, place):
        return None
    name, arguments = operator_name(reader), arguments_of(reader)
    rank = len(shape_of(source))
    if name in _SELECTED and arguments["self"] is source:
        if arguments["dim"] % rank != place.token or places.rowwise(reader):
            return None
        if name == "select":
            at = arguments["index"]
            return Positions(at, None if at == -1 else at + 1) if isinstance(at, int) else None
        if arguments["step"] != 1:
            return None
        bounds = arguments["start"], arguments["end"]
        if any(isinstance(bound, fx.Node) for bound in bounds):
            return None
        return Positions(*bounds)
    if name == "index" and arguments["self"] is source and (place.batch, place.token) == (0, 1):
        return _indexed(places, arguments["indices"])
    return None


def _indexed(places: RowPlaces, indices: Any) -> Positions | None:
    """Return the positions of `x[arange(batch), positions]`."""
    if len(indices) != 2 or not all(isinstance(item, fx.Node) for item in indices):
        return None
    samples, positions = indices
    counts = samples.op == "call_function" and operator_name(samples) == "arange"
    if not counts or shape_of(samples) != (places.batch,) or shape_of(positions) != (places.batch,):
        return None
    start = arguments_of(samples).get("start", 0)
    return Positions(index=positions) if start == 0 else None


class _Backwards:
    """Follows the demand for some positions from a value backwards."""

    def __init__(self, program: Program, places: RowPlaces, positions: Positions) -> None:
        self._program = program
        self._places = places
        self._positions = positions
        self._needed = _ancestors([positions.index]) if positions.index is not None else set()

    def from_(self, source: fx.Node) -> Demand | None:
        inside: set[fx.Node] = set()
        dims: dict[fx.Node, int] = {}
        operands: dict[fx.Node, dict[fx.Node, int]] = {}
        readers = tuple(source.users)
        for node in reversed(self._program.graph.nodes):
            read = node.users and all(node in operands.get(user, ()) for user in node.users)
            if node is not source and not read:
                continue
            dim = self._dim(node)
            if dim is None or node in self._needed:
                continue
            cut = self._operands(node, dim)
            if cut is not None:
                inside.add(node)
                dims[node], operands[node] = dim, cut
        # One of several results alone cannot be cut before they are made.
        inside.difference_update(
            [n for n in inside if n.target is operator.getitem and n.args[0] not in inside]
        )
        if source not in inside:
            return None
        nodes = tuple(node for node in self._program.graph.nodes if node in inside)
        facts = facts_of(self._program)
        flops = sum(facts.nodes[node].forward_flops for node in nodes)
        tokens = self._places.tokens
        kept = (
            1
            if self._positions.index is not None
            else len(range(tokens)[slice(self._positions.start, self._positions.stop)])
        )
        outside = {n: {o: d for o, d in operands[n].items() if o not in inside} for n in nodes}
        return Demand(
            source,
            readers,
            self._positions,
            nodes,
            dims,
            outside,
            flops - round(flops * kept / tokens),
        )

    def _dim(self, node: fx.Node) -> int | None:
        """Return the dimension of a node's tokens, of its queries for scores; None if unknown."""
        if node.op not in ("call_function", "call_module"):
            return None
        if not isinstance(node.meta.get("val"), torch.Tensor):
            parts = {
                self._dim(user) if user.target is operator.getitem else None for user in node.users
            }
            return parts.pop() if len(parts) == 1 else None
        place = self._places.place(node)
        if place is not None:
            plain = place.token is not None and not place.merged
            plain = plain and is_plain(self._places, node, place)
            return place.token if plain else None
        rank = len(shape_of(node))
        return rank - 2 if self._places.token_dims(node) == (rank - 2, rank - 1) else None

    def _operands(self, node: fx.Node, dim: int) -> dict[fx.Node, int] | None:
        """Return the operands to cut, with the dimension; None if the node reads other tokens."""
        if node.op == "call_module":
            return self._by_place(node) if self._places.rowwise(node) else None
        if node.target is operator.getitem:
            return dict.fromkeys(tensor_nodes(node), dim)
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            return None
        if not isinstance(node.meta["val"], torch.Tensor):
            return self._by_place(node) if self._places.rowwise(node) else None
        name, arguments = operator_name(node), arguments_of(node)
        rank = len(shape_of(node))
        if name == _ATTENTION:
            return _of_queries(arguments) if dim == rank - 2 else None
        if name in ("matmul", "bmm"):
            left = arguments["self"]
            if dim != rank - 2 or len(shape_of(left)) != rank:
                return None
            right = arguments.get("mat2", arguments.get("other"))
            return {left: rank - 2} if left is not right else None
        if self._places.rowwise(node):
            return self._by_place(node)
        mixed = mixed_dims(node)
        if self._places.place(node) is not None or mixed is None or size_argument(node):
            return None
        if name in _MOVES:
            return None
        # Scores [..., query, key]: element by element, or over the keys.
        cut: dict[fx.Node, int] = {}
        for source in tensor_nodes(node):
            shape = shape_of(source)
            at = dim - (rank - len(shape))
            if at in mixed.get(source, frozenset()):
                return None
            if at >= 0 and shape[at] != 1:
                if shape[at] != shape_of(node)[dim]:
                    return None
                cut[source] = at
        return cut

    def _by_place(self, node: fx.Node) -> dict[fx.Node, int] | None:
        cut: dict[fx.Node, int] = {}
        for source in tensor_nodes(node):
            if not self._places.token_dims(source):
                continue
            place = self._places.place(source)
            if place is None or place.token is None or place.merged or place.batch not in (0, None):
                return None
            if not is_plain(self._places, source, place):
                return None
            if self._positions.index is not None and place.batch is None:
                # A table of all samples gets a row for each: it needs a dimension for them.
                found = self._places.place(node)
                assert found is not None
                assert found.batch is not None
                at = found.batch - (len(shape_of(node)) - len(shape_of(source)))
                if at < 0 or shape_of(source)[at] != 1:
                    return None
            cut[source] = place.token
        return cut


def _of_queries(arguments: Mapping[str, Any]) -> dict[fx.Node, int] | None:
    """Return the operands of an attention that have queries."""
    query, mask = arguments["query"], arguments["attn_mask"]
    if query in (arguments["key"], arguments["value"]):
        return None
    cut = {query: len(shape_of(query)) - 2}
    if mask is not None and shape_of(mask)[-2] != 1:
        cut[mask] = len(shape_of(mask)) - 2
    return cut


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found, pending = set(nodes), list(nodes)
    while pending:
        for item in pending.pop().all_input_nodes:
            if item not in found:
                found.add(item)
                pending.append(item)
    return found
