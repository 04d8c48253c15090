"""One walk over a program that applies the axis rules to every node."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from . import axis_contractions, axis_elements
from .axis_flow import RULES, Flow, Terms, arguments_of, operator_name, tensor_nodes, tensors_of
from .axis_terms import atoms
from .program import Program
from .structure import outside_objects


def walk(program: Program) -> Flow:
    """Give every tensor dimension of a program its term."""
    flow = Flow()
    names: dict[int, str] = {}
    for node, plain in zip(program.placeholders, outside_objects(program.inputs), strict=True):
        flow.terms[node] = flow.new(node)
        if plain:
            flow.pin(flow.dims(node), f"comes from the input {node.name}")
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        flow.outer, flow.module = node, None
        body = node.meta.get("body") if node.op == "call_module" else None
        if body is not None:
            _walk_body(flow, program, node, body, names)
        else:
            _visit(flow, program, node, names)
    _finish(flow, program)
    return flow


def _finish(flow: Flow, program: Program) -> None:
    """Pin what the outputs show.

    State keeps its size too, but for the heads and head dimensions inside: a cache of keys and
    values is only ever read by the attention that wrote it.
    """
    attention = {axis for term in (*flow.heads, *flow.head_dims) for axis in atoms(term)}
    results = [item for item in _flat(program.result.args) if isinstance(item, fx.Node)]
    for node, plain in zip(results, outside_objects(program.outputs), strict=True):
        for axis in (axis for term in flow.dims(node) for axis in atoms(term)):
            if plain or axis not in attention:
                flow.pin(axis, "reaches an output of the model")
    flow.pins.extend(flow.conflicts)


def _walk_body(
    flow: Flow, program: Program, call: fx.Node, body: fx.Graph, names: dict[int, str]
) -> None:
    """Analyse a leaf module's own graph in place of its call."""
    flow.module = str(call.target)
    inputs = iter(tensor_nodes(call))
    for node in body.nodes:
        if node.op == "placeholder":
            if not tensors_of(node.meta.get("val")):
                continue
            source = next(inputs)
            flow.terms[node] = flow.terms.get(source, ())
            if source in flow.sources:
                flow.sources[node] = flow.sources[source]
        elif node.op == "output":
            result = next(item for item in _flat(node.args) if isinstance(item, fx.Node))
            flow.terms[call] = flow.terms.get(result, ())
            if result in flow.sources:
                flow.sources[call] = flow.sources[result]
        else:
            _visit(flow, program, node, names)


def _visit(flow: Flow, program: Program, node: fx.Node, names: dict[int, str]) -> None:
    if node.op == "get_attr":
        _visit_weight(flow, program, node, names)
        return
    tensors = tensor_nodes(node)
    for item in tensors:
        for name in flow.sources.get(item, ()) if item.op == "get_attr" else ():
            assert flow.outer is not None
            if flow.outer not in flow.users.setdefault(name, []):
                flow.users[name].append(flow.outer)
    if node.op == "call_function" and all(item in flow.sources for item in tensors):
        flow.sources[node] = frozenset().union(*(flow.sources[item] for item in tensors))
    flow.terms[node] = _apply(flow, node)


def _visit_weight(flow: Flow, program: Program, node: fx.Node, names: dict[int, str]) -> None:
    value = _attribute(program, str(node.target))
    if not isinstance(value, torch.Tensor):
        return
    name = names.setdefault(id(value), str(node.target))
    if name not in flow.parameters:
        flow.parameters[name] = flow.new_dims(value)
    flow.terms[node] = flow.parameters[name]
    flow.sources[node] = frozenset({name})


def _apply(flow: Flow, node: fx.Node) -> Terms | list[Terms]:
    if node.target is operator.getitem:
        found = flow.terms.get(node.args[0], ())  # type: ignore[arg-type]
        return found[node.args[1]] if isinstance(found, list) else ()  # type: ignore[index]
    if not tensors_of(node.meta.get("val")) and not _reads_values(node):
        return ()
    if not isinstance(node.target, torch._ops.OpOverload):
        return axis_contractions.unknown(flow, node, {})
    name = operator_name(node)
    found_rule = RULES.get(name) or RULES.get(name.rstrip("_"))
    if found_rule is not None:
        return found_rule(flow, node, arguments_of(node))
    if torch.Tag.pointwise in node.target.tags:
        return axis_elements.pointwise(flow, node, {})
    return axis_contractions.unknown(flow, node, {})


def _reads_values(node: fx.Node) -> bool:
    """Whether an operation without tensor result depends on elements, not just on the shape."""
    return isinstance(node.target, torch._ops.OpOverload) and not operator_name(node).startswith(
        "sym_"
    )


def _attribute(program: Program, target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(program.model.get_submodule(module), name)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [item for inner in value for item in _flat(inner)]
    return [value]
