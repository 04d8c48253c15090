"""Regions that the exporter wraps in a subgraph, put back into the flat graph.

`torch.no_grad()` and `torch.autocast()` inside a forward come out of the exporter as calls of a
subgraph. A no-grad region is inlined with `detach` on what leaves it (same values, same
gradients); an autocast region between the calls that enter and leave it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

_GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST_REGION = torch.ops.higher_order.wrap_with_autocast


def inline_regions(module: fx.GraphModule) -> fx.Graph:
    """Inline every wrapped region of an exported graph, nested ones too, in place.

    Args:
        module: The exporter's graph module; its subgraphs are attributes.

    Returns:
        The module's graph, without calls of subgraphs.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is _GRAD_REGION:
            enabled, body, *operands = node.args
            outputs = _inline(module, node, body, operands)
            if not enabled:
                outputs = [_detached(graph, node, output) for output in outputs]
            _replace(graph, node, outputs)
        elif node.target is _AUTOCAST_REGION:
            device, dtype, enabled, cache, body, *operands = node.args
            with graph.inserting_before(node):
                context = graph.call_function(_enter_autocast, (device, dtype, enabled, cache))
            outputs = _inline(module, node, body, operands)
            with graph.inserting_before(node):
                leave = graph.call_function(_exit_autocast, (context,))
            for boundary in (context, leave):
                boundary.meta = {**node.meta, "val": None}
            _replace(graph, node, outputs)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph


def _inline(module: fx.GraphModule, node: fx.Node, body: Any, operands: list[Any]) -> list[fx.Node]:
    subgraph = inline_regions(getattr(module, body.target))
    inputs = [n for n in subgraph.nodes if n.op == "placeholder"]
    mapping = dict(zip(inputs, operands, strict=True))
    with module.graph.inserting_before(node):
        result: Any = module.graph.graph_copy(subgraph, mapping)
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _detached(graph: fx.Graph, node: fx.Node, output: fx.Node) -> fx.Node:
    if not isinstance(output.meta["val"], torch.Tensor):
        return output
    with graph.inserting_before(node):
        detached = graph.call_function(torch.ops.aten.detach.default, (output,))
    detached.meta = {**output.meta}
    return detached


def _replace(graph: fx.Graph, node: fx.Node, outputs: list[fx.Node]) -> None:
    for user in list(node.users):
        assert user.target is operator.getitem
        index: Any = user.args[1]
        user.replace_all_uses_with(outputs[index])
        graph.erase_node(user)
    graph.erase_node(node)
