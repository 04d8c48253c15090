"""A program as it was: cheap to take, because changes replace tensors and never write to them."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from .program import Program


class Snapshot:
    """The modules' attribute tables and the graph of a program at one moment."""

    def __init__(self, program: Program) -> None:
        """Remember which objects are where; no tensor is copied."""
        self._program = program
        self._tables = [(module, _copied_table(module)) for module in program.model.modules()]
        self._graph = copied_graph(program.graph)

    def restore(self) -> None:
        """Put everything back."""
        for module, table in self._tables:
            module.__dict__.clear()
            module.__dict__.update(table)
        self._program.graph = self._graph
        self._program.changed()


def _copied_table(module: nn.Module) -> dict[str, Any]:
    return {
        name: type(value)(value) if type(value) is dict else value
        for name, value in vars(module).items()
    }


def copied_graph(graph: fx.Graph) -> fx.Graph:
    """Copy a graph with the graphs of its leaf calls: passes edit both."""
    result = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result.output(result.graph_copy(graph, mapping))
    mapping[graph.output_node()] = result.output_node()
    for node, copy in mapping.items():
        copy.meta = dict(node.meta)
        body = copy.meta.get("body")
        if body is not None:
            copy.meta["body"] = copied_graph(body)
    return result
