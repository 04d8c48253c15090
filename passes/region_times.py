"""A part of a program as something to be timed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from .facts import attribute_of
from .program import Program, hint, shape_of
from .workload import Workload, stand_in


def region_workload(program: Program, nodes: Sequence[fx.Node]) -> Workload:
    """Return some nodes as a workload that computes the last of them.

    What they read from outside is random, of the captured shapes; sizes are those of the example.
    Parts of equal form have equal signatures.

    Args:
        program: The program.
        nodes: Nodes in graph order.
    """
    root, graph = nn.Module(), fx.Graph()
    inputs: list[torch.Tensor] = []
    copies: dict[fx.Node, Any] = {}
    inside = set(nodes)
    outside = dict.fromkeys(
        source for node in nodes for source in node.all_input_nodes if source not in inside
    )
    for source in outside:
        value: Any = source.meta.get("val")
        if source.op == "get_attr":
            copies[source] = _attribute(program, root, graph, source)
        elif isinstance(value, torch.Tensor):
            inputs.append(stand_in(value, shape_of(source)))
            copies[source] = graph.placeholder(f"input_{len(inputs)}")
        else:
            copies[source] = hint(value)
    for node in nodes:
        if node.op == "get_attr":
            copies[node] = _attribute(program, root, graph, node)
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        target = node.target
        if node.op == "call_module":
            target = f"part_{len(copies)}"
            root.add_module(target, program.module(str(node.target)))
        copies[node] = graph.create_node(node.op, target, args, kwargs, f"value_{len(copies)}")
    graph.output(copies[nodes[-1]])
    return Workload(fx.GraphModule(root, graph), tuple(inputs))


def _attribute(program: Program, root: nn.Module, graph: fx.Graph, node: fx.Node) -> fx.Node:
    name = f"attribute_{len(graph.nodes)}"
    value = attribute_of(program, str(node.target))
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)
    return graph.get_attr(name)
