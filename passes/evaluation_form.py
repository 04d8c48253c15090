"""Nodes of a program as they are in evaluation mode, whatever the mode of the model.

before: h = norm(dropout(x, 0.1 * self.training))      follows `model.train()`
after:  h = norm(x)                                     does not
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from .axis_flow import arguments_of, operator_name
from .facts import attribute_of
from .program import Program
from .propagation import evaluation_body

_MODES = ("train", "training")
_RATES = ("dropout_p",)


def follows_mode(program: Program, node: fx.Node) -> bool:
    """Say whether a node computes something else in training mode than in evaluation mode."""
    if node.op == "get_attr":
        return _is_flag(program, node)
    if node.op != "call_module":
        return False
    return any(_depends_on_mode(item) for item in node.meta["body"].nodes)


def is_uncontrolled(node: fx.Node) -> bool:
    """Say whether a node draws random numbers that no training flag switches off."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    return not any(item.name in (*_MODES, *_RATES) for item in node.target._schema.arguments)


def fix_evaluation_mode(program: Program, nodes: Collection[fx.Node]) -> None:
    """Give nodes the form they have in evaluation mode: no dropout, fixed running statistics.

    Args:
        program: The program; its graph is edited, its modules are not.
        nodes: Which nodes; other readers of a `training` flag among them keep the flag.
    """
    order = [node for node in program.graph.nodes if node in nodes]
    for node in order:
        if not follows_mode(program, node):
            continue
        if node.op == "get_attr":
            _switch_off(node, nodes)
        else:
            node.replace_all_uses_with(_inlined(program, node))
        if not node.users:
            program.graph.erase_node(node)
    program.changed()


def _switch_off(flag: fx.Node, nodes: Collection[fx.Node]) -> None:
    """Let some readers of a `training` flag read False."""

    def value(item: fx.Node) -> fx.Node | bool:
        return False if item is flag else item

    for user in [user for user in flag.users if user in nodes]:
        user.args = fx.map_arg(user.args, value)
        user.kwargs = fx.map_arg(user.kwargs, value)


def _inlined(program: Program, node: fx.Node) -> fx.Node:
    """Insert the operations of a leaf call in evaluation mode; return their result."""
    body = evaluation_body(program, node)
    scope = {"modules": node.meta["modules"], "calls": node.meta["calls"]}
    copies: dict[fx.Node, fx.Node] = {}
    result = node
    with program.graph.inserting_before(node):
        for item in body.nodes:
            if item.op == "placeholder":
                copies[item] = node.all_input_nodes[0]
            elif item.op == "output":
                result = copies[item.args[0]]
            elif _is_idle_dropout(item):
                copies[item] = copies[item.all_input_nodes[0]]
            else:
                copies[item] = program.graph.node_copy(item, copies.__getitem__)
                copies[item].meta = {"val": item.meta["val"], **scope}
    return result


def _is_idle_dropout(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return "dropout" in operator_name(node) and arguments_of(node).get("train") is False


def _is_flag(program: Program, node: fx.Node) -> bool:
    return str(node.target).rpartition(".")[2] == "training" and isinstance(
        attribute_of(program, str(node.target)), bool
    )


def _depends_on_mode(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    names = {item.name for item in schema.arguments}
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    writes = schema.is_mutable and node.all_input_nodes[0].op == "get_attr"
    return bool(names & {*_MODES}) or random or writes
