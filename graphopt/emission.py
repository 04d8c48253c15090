"""The flat graph as short functions that follow the module tree.

before: one function of thousands of lines
after:  one function for each call of each block, and a root function that calls the blocks

A block is an element of a sequence of like modules (the layers of a model). Its part of the graph
becomes a function of the block; the root calls the block itself, so hooks, activation
checkpointing and sharding on blocks keep working.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import fx

from graphopt.passes.module_blocks import block_names
from graphopt.passes.program import Program, compile_graph


@dataclass
class Emission:
    """The functions of a program.

    Attributes:
        root: Function of the model: (model, *input tensors) -> tuple of output tensors.
        blocks: For each block, by name, its functions in call order.
        code: The generated Python, for people.
    """

    root: Callable[..., Any]
    blocks: dict[str, list[Callable[..., Any]]] = field(default_factory=dict)
    code: str = ""


def emit(program: Program, *, present: Mapping[str, int] = MappingProxyType({})) -> Emission:
    """Generate the functions of a program, block by block.

    A block whose nodes cannot run in one piece (something outside reads one of them and feeds
    another) stays part of the root function.

    Args:
        program: The program.
        present: How many functions blocks have already, by name; the new ones come after them.
    """
    order = list(program.graph.nodes)
    position = {node: index for index, node in enumerate(order)}
    members = _block_members(program)
    for key in [k for k, nodes in members.items() if not _is_one_piece(nodes, position)]:
        del members[key]
    owner = {node: key for key, nodes in members.items() for node in nodes}
    last = {key: nodes[-1] for key, nodes in members.items()}

    root = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    blocks: dict[str, list[Callable[..., Any]]] = defaultdict(list)
    sections: list[str] = []
    for node in order:
        if node not in owner:
            copies[node] = root.node_copy(node, copies.__getitem__)
            continue
        key = owner[node]
        if node is not last[key]:
            continue
        name, _, _ = key.partition("@")
        graph, inputs, outputs = _block_graph(members[key], name)
        call = root.call_module(
            name,
            tuple(copies[n] for n in inputs),
            {"_graph": present.get(name, 0) + len(blocks[name])},
        )
        blocks[name].append(compile_graph(graph))
        sections.append(f"# {key}\n{graph.python_code('self').src.strip()}")
        for index, output in enumerate(outputs):
            copies[output] = (
                call if len(outputs) == 1 else root.call_function(operator.getitem, (call, index))
            )
    code = "\n\n".join([*sections, f"# model\n{root.python_code('self').src.strip()}"])
    return Emission(compile_graph(root), dict(blocks), code)


def _block_members(program: Program) -> dict[str, list[fx.Node]]:
    """Return, for each block call ("layer.0", "block@1"), its nodes in order."""
    names = set(block_names(program.model))
    members: dict[str, list[fx.Node]] = defaultdict(list)
    owner: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        calls = [c for c in node.meta["calls"] if c.partition("@")[0] in names]
        if not calls and len(node.meta["calls"]) == 1:
            sources = {owner.get(source) for source in node.all_input_nodes}
            calls = [s for s in sources if s] if len(sources) == 1 else []
        if calls:
            owner[node] = calls[0]
            members[calls[0]].append(node)
    for key, nodes in members.items():
        name = key.partition("@")[0]
        inside = set(nodes)
        own = {
            source
            for node in nodes
            for source in node.all_input_nodes
            if source.op == "get_attr" and str(source.target).startswith(name + ".")
        }
        members[key] = [
            *(n for n in own if all(user in inside for user in n.users)),
            *nodes,
        ]
    return dict(members)


def _is_one_piece(nodes: list[fx.Node], position: dict[fx.Node, int]) -> bool:
    inside = set(nodes)
    end = position[nodes[-1]]
    return all(position[user] > end for n in nodes for user in n.users if user not in inside)


def _block_graph(nodes: list[fx.Node], name: str) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """Copy a block's nodes into a graph of the block, with its inputs and outputs."""
    inside = set(nodes)
    inputs = list(
        dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in inside)
    )
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op in ("call_module", "get_attr"):
            copies[node].target = str(node.target).removeprefix(name + ".")
    results = tuple(copies[node] for node in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return graph, inputs, outputs
