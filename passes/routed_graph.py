"""The graph of a part that runs on chosen tokens, made from its route.

before: y = part(x, mask, table, T)
after:  i = choose_tokens(gate, x, ...);  s = take_tokens(x, i)
        y = put_tokens(x, i, part(s, take_tokens(mask, i), take_tokens(table, i), k))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.kernels.token_routers import blend_tokens, choose_tokens
from graphopt.kernels.token_selection import put_tokens, spread_tokens, take_tokens

from .program import Program
from .token_blocks import merged_dims, token_dims
from .token_route import Route, sizes_argument


def apply_route(
    program: Program,
    route: Route,
    gate: str,
    score: fx.Node | None,
    ids: str | None,
    padding: str | None,
    *,
    per_sample: bool,
    blend: bool,
) -> None:
    """Rewrite a part to run on the tokens that a gate chooses.

    Args:
        program: The program; its graph is edited.
        route: What to rewrite.
        gate: Name of the gate in the model.
        score: What speaks for a token.
        ids: Name of the input with token ids that the gate looks at.
        padding: Name of the padding mask.
        per_sample: Whether every sample has tokens of its own.
        blend: Whether the gate weighs the result.
    """
    _Rewriting(program, route, per_sample).run(gate, score, ids, padding, blend)


class _Rewriting:
    def __init__(self, program: Program, route: Route, per_sample: bool) -> None:
        self._graph = program.graph
        self._program = program
        self._route = route
        self._order = {node: index for index, node in enumerate(program.graph.nodes)}
        self._first = min(route.inside, key=self._order.__getitem__)
        self._batch = route.batch_dim if per_sample else None
        self._values: dict[fx.Node, fx.Node] = {}
        self._numbers: dict[fx.Node, fx.Node] = {}

    def run(
        self,
        gate: str,
        score: fx.Node | None,
        ids: str | None,
        padding: str | None,
        blend: bool,
    ) -> None:
        graph, route = self._graph, self._route
        inputs = {node.name: node for node in self._program.placeholders}
        outside_users = list(route.exit.users)
        with graph.inserting_before(self._first):
            holder = self._root(graph.get_attr(gate))
            self._index = self._root(
                graph.call_function(
                    choose_tokens,
                    (
                        holder,
                        route.entry,
                        score,
                        inputs[ids] if ids else None,
                        inputs[padding] if padding else None,
                        route.token_dim,
                        route.batch_dim,
                    ),
                )
            )
            self._chosen = self._root(self._take(route.entry, (route.token_dim,), self._batch))
            self._count = self._root(
                graph.call_function(torch.ops.aten.sym_size.int, (self._chosen, route.token_dim))
            )
        for number in route.numbers:
            number.target = torch.ops.aten.sym_size.int
            number.args = (route.entry, route.token_dim)
            number.kwargs = {}
        for node in route.inside:
            self._rewrite(node)
        for node, place in route.returned.items():
            self._spread(node, place)
        with graph.inserting_after(route.exit):
            result = self._root(graph.call_function(put_tokens, ()))
        if blend:
            with graph.inserting_before(result):
                weighed = self._root(
                    graph.call_function(blend_tokens, (holder, self._chosen, route.exit))
                )
        else:
            weighed = route.exit
        result.args = (route.entry, self._index, weighed, route.token_dim, self._batch)
        for user in outside_users:
            user.replace_input_with(route.exit, result)

    def _take(self, value: fx.Node, dims: tuple[int, ...], batch: int | None) -> fx.Node:
        return self._graph.call_function(take_tokens, (value, self._index, dims, batch))

    def _spread(self, node: fx.Node, place: tuple[int, int | None]) -> None:
        """Return a value inside with all tokens, zeros for those that skip the part."""
        users = [user for user in node.users if user not in self._route.inside]
        arguments = (node, self._index, self._route.entry, self._route.token_dim, place)
        with self._graph.inserting_after(node):
            whole = self._graph.call_function(spread_tokens, arguments)
        whole.meta = _scope(node)
        for user in users:
            user.replace_input_with(node, whole)

    def _rewrite(self, node: fx.Node) -> None:
        sizes = sizes_argument(node)
        if sizes is not None:
            changed = [self._resized(node, dim, size) for dim, size in enumerate(sizes)]
            node.args = (node.args[0], changed, *node.args[2:])
        for source in list(node.all_input_nodes):
            if source is self._route.entry:
                node.replace_input_with(source, self._chosen)
            elif source in self._route.taken:
                node.replace_input_with(source, self._taken(source))
            elif isinstance(source.meta.get("val"), torch.SymInt):
                number = self._number(source)
                if number is not source:
                    node.replace_input_with(source, number)

    def _taken(self, source: fx.Node) -> fx.Node:
        if source not in self._values:
            dims, batch = self._route.taken[source]
            with self._place(source):
                self._values[source] = self._take(source, dims, batch)
            # It belongs to where its source is computed, so that blocks stay in one piece.
            self._values[source].meta = _scope(source)
        return self._values[source]

    def _place(self, source: fx.Node) -> Any:
        if self._order[source] < self._order[self._first]:
            return self._graph.inserting_before(self._first)
        return self._graph.inserting_after(source)

    def _resized(self, node: fx.Node, dim: int, size: Any) -> Any:
        tokens = self._route.tokens
        if dim in token_dims(tokens, node) and isinstance(size, int) and size != -1:
            return self._count
        static = isinstance(self._route.symbol, int)
        if dim in merged_dims(tokens, node) and (static or isinstance(size, int)):
            return -1
        return size

    def _number(self, item: fx.Node) -> fx.Node:
        """Return a number with the chosen tokens in place of all."""
        symbol = self._route.symbol
        if isinstance(symbol, int) or item in self._numbers.values():
            return item
        expression = item.meta["val"].node.expr
        if symbol not in expression.free_symbols or item in self._route.inside:
            return item
        if expression == symbol:
            return self._count
        if item not in self._numbers:
            with self._place(item):
                copy = self._graph.node_copy(item, self._number)
            self._numbers[item] = copy
        return self._numbers[item]

    def _root(self, node: fx.Node) -> fx.Node:
        node.meta.update({"modules": ("",), "calls": ("",)})
        return node


def _scope(node: fx.Node) -> dict[str, object]:
    return {"modules": node.meta["modules"], "calls": node.meta["calls"]}
