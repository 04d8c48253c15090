"""Branches of a graph that run only where a gate asks for them.

before: a = f(x);  b = x + a;  c = gate(b, entry=x)
after:  c = branch(gate, x, f)       which calls gate.run(x, lambda: x + f(x), (f,))

A pass writes straight-line graphs, so that every analysis and every later pass sees through them. A
node marked by `make_lazy` is turned into a call of `run` when the graph is compiled: what only
that node reads is then computed if and when the gate says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

__all__ = ["make_lazy", "only_for", "with_lazy_branches"]

_LAZY = "lazy"


def make_lazy(node: fx.Node) -> None:
    """Let the gate of a node `gate(value, entry=entry)` decide whether its value is computed.

    The gate's `run(entry, block, sources)` takes the place of the call, see `LayerGate`.
    """
    node.meta[_LAZY] = True


def only_for(value: fx.Node, entry: fx.Node, reader: fx.Node | None = None) -> list[fx.Node]:
    """Return the nodes that nothing but one value needs, in graph order.

    Left out: `entry`, and with it what that needs, and inputs of the graph.

    Args:
        value: The value.
        entry: Where to stop.
        reader: Who reads the value: the value is then among the nodes, and if it has other readers,
            there are none.
    """
    found: set[fx.Node] = set()
    last = value if reader is None else reader
    for node in reversed(_needed_for(value)):
        if node.op == "placeholder" or node in (entry, last):
            continue
        if all(user in found or user is last for user in node.users):
            found.add(node)
    return [node for node in value.graph.nodes if node in found]


def with_lazy_branches(
    graph: fx.Graph, compiled: Callable[[fx.Graph], Callable[..., Any]]
) -> fx.Graph:
    """Return the graph with every lazy node, and what only it reads, as one call.

    Args:
        graph: The graph; it is not changed, and returned itself if it has no such node.
        compiled: Turns a graph into a function whose first argument is not used.
    """
    lazy = [node for node in graph.nodes if node.meta.get(_LAZY)]
    if not lazy:
        return graph
    owner: dict[fx.Node, fx.Node] = {}
    for node in reversed(lazy):
        if node not in owner:
            for inner in only_for(node.args[0], node.kwargs["entry"], node):
                owner.setdefault(inner, node)
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in owner:
            continue
        if node.meta.get(_LAZY):
            inside = [other for other in graph.nodes if owner.get(other) is node]
            copies[node] = _call(result, node, inside, copies, compiled)
        else:
            copies[node] = result.node_copy(node, copies.__getitem__)
    return result


def _needed_for(value: fx.Node) -> dict[fx.Node, None]:
    """Return a node and all that it depends on, in graph order."""
    needed = {value}
    pending = [value]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                pending.append(source)
    return dict.fromkeys(node for node in value.graph.nodes if node in needed)


def _call(
    graph: fx.Graph,
    node: fx.Node,
    inside: list[fx.Node],
    copies: dict[fx.Node, fx.Node],
    compiled: Callable[[fx.Graph], Callable[..., Any]],
) -> fx.Node:
    """Insert the call of a lazy node into a graph of copies."""
    value, entry = node.args[0], node.kwargs["entry"]
    assert isinstance(value, fx.Node)
    assert isinstance(entry, fx.Node)
    body = fx.Graph()
    inner: dict[fx.Node, fx.Node] = {}
    members = set(inside)
    outside = dict.fromkeys(
        source for item in inside for source in item.all_input_nodes if source not in members
    )
    for source in outside or {value: None}:
        inner[source] = body.placeholder(source.name)
    for item in inside:
        inner[item] = body.node_copy(item, inner.__getitem__)
    body.output(inner[value])
    function, names = _closed(with_lazy_branches(body, compiled), compiled)
    arguments = [graph.get_attr(name) for name in names]
    arguments += [copies[source] for source in outside or {value: None}]
    gate = graph.get_attr(str(node.target))
    return graph.call_function(_branch(function), (gate, copies[entry], *arguments))


def _closed(
    graph: fx.Graph, compiled: Callable[[fx.Graph], Callable[..., Any]]
) -> tuple[Callable[..., Any], list[str]]:
    """Compile a graph as a function of all that it reads.

    Returns:
        The function, and the names of the attributes (modules, parameters, flags) that it takes
        before the graph's inputs.
    """
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, fx.Node] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op in ("call_module", "get_attr") and name not in attributes:
            attributes[name] = result.placeholder(f"from_{node.name}")
    for node in graph.nodes:
        if node.op == "get_attr":
            copies[node] = attributes[str(node.target)]
        elif node.op == "call_module":
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            module = attributes[str(node.target)]
            copies[node] = result.call_function(_call_module, (module, *args), kwargs)
        else:
            copies[node] = result.node_copy(node, copies.__getitem__)
    function = compiled(result)

    def closed(*values: Any) -> Any:
        return function(None, *values)

    return closed, list(attributes)


def _call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _branch(function: Callable[..., Any]) -> Callable[..., Any]:
    def branch(gate: Any, entry: Tensor, *sources: Any) -> Any:
        return gate.run(entry, lambda: function(*sources), sources)

    return branch
