"""A program as it was, and its twin: cheap, because changes replace tensors and never write."""

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


def twin_of(program: Program) -> Program:
    """Return a program that can be changed on its own, on modules that share all tensors.

    Modules are registered as in the original, shared ones stay shared; everything that is neither
    a module nor a table of a module is the very same object.
    """
    modules = list(program.model.modules())
    twins: dict[int, nn.Module] = {}
    for module in modules:
        twins[id(module)] = object.__new__(type(module))
    for module in modules:
        table = _copied_table(module)
        for name, child in table["_modules"].items():
            if child is not None:
                table["_modules"][name] = twins[id(child)]
        twins[id(module)].__dict__.update(table)
    twin = program.of_copy(twins[id(program.model)])
    twin.graph = copied_graph(program.graph)
    return twin


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
