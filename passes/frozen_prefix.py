"""The part of a program that depends on inputs and frozen parameters only, found by dataflow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import fx, nn

from graphopt.kernels.packed_rows import real_rows

from .axis_flow import tensors_of
from .evaluation_form import is_uncontrolled
from .facts import facts_of
from .padding import padding_input
from .program import Program, compile_values, shape_of
from .row_places import row_places
from .verifier import preserved, relative_error, rounding_bound

_FLOPS_PER_ELEMENT = 16
"""What a stored element must have cost: about as much as reading it from a page in memory."""


@dataclass(frozen=True)
class FrozenPrefix:
    """What can be computed once for a sample.

    Attributes:
        nodes: What the values are computed from, and what is computed from them and from nothing
            that is trained.
        values: Those of them that the rest reads and that are worth keeping: one row per sample.
            What else the rest reads of `nodes` (masks, rotary tables) costs next to nothing.
        token_dims: For each of the values its dimension over the tokens of the padding input, None
            if it has none.
        packed: For each of the values whether that dimension counts the real tokens of all samples
            together, one sample after the other.
        inputs: Names of the inputs on whose values, not only sizes, these depend.
        flops: Operations of the values, one forward at the example's sizes.
    """

    nodes: frozenset[fx.Node]
    values: tuple[fx.Node, ...]
    token_dims: tuple[int | None, ...]
    packed: tuple[bool, ...]
    inputs: tuple[str, ...]
    flops: int


def frozen_prefix(program: Program, frozen: Collection[str]) -> FrozenPrefix:
    """Return the frozen prefix of a program.

    Args:
        program: The program.
        frozen: Names of the parameters that are not trained; tied ones need one of their names.
    """
    hoisted = _hoisted(program, frozen)
    facts = facts_of(program)
    samples = {_symbol(node, 0) for node in program.placeholders} - {None}
    covered: set[fx.Node] = set()
    values: list[fx.Node] = []
    flops = 0
    for node in program.graph.nodes:
        if not _is_read_outside(node, hoisted):
            continue
        if _symbol(node, 0) not in samples and packed_dim(program, node) is None:
            continue
        fresh = _ancestors(node) - covered
        cost = sum(facts.nodes[item].forward_flops for item in fresh)
        if cost >= _FLOPS_PER_ELEMENT * prod(shape_of(node)):
            values.append(node)
            covered |= fresh
            flops += cost
    read = _ancestors(*values, through_sizes=False) if values else set()
    inputs = tuple(node.name for node in program.placeholders if node in read)
    packed = [packed_dim(program, node) for node in values]
    dims = tuple(
        token_dim(program, node) if found is None else found
        for node, found in zip(values, packed, strict=True)
    )
    nodes = covered | _descendants(values) & hoisted
    nodes.update(*map(_ancestors, nodes))
    return FrozenPrefix(
        frozenset(nodes),
        tuple(values),
        dims,
        tuple(found is not None for found in packed),
        inputs,
        flops,
    )


def prefix_graph(program: Program, prefix: FrozenPrefix) -> fx.Graph:
    """Return the graph of the prefix alone: from the program's inputs to the prefix's values."""
    needed = set().union(*(_ancestors(node) for node in prefix.values))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in prefix.values))
    return graph


def remaining_graph(program: Program, prefix: FrozenPrefix) -> fx.Graph:
    """Return the graph without the prefix: its values are inputs, after those of the program."""
    needed = {node for node in program.graph.nodes if node not in prefix.nodes}
    for node in reversed(program.graph.nodes):
        if node in needed and node not in prefix.values:
            needed.update(node.all_input_nodes)
    graph = fx.Graph()
    copies = {node: graph.node_copy(node) for node in program.placeholders}
    for value in prefix.values:
        copies[value] = graph.placeholder(value.name)
        copies[value].meta = dict(value.meta)
    for node in program.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return graph


def mixes_samples(program: Program, prefix: FrozenPrefix) -> str | None:
    """Say which value of a prefix differs with the other samples of the batch, None if none does.

    Runs the prefix on the example's first rows, together and in the opposite order.
    """
    run = compile_values(program, prefix.values)
    tensors = program.few_rows()
    rows = {node.name for node in program.placeholders if _symbol(node, 0) is not None}
    count = max(
        (t.shape[0] for t, n in zip(tensors, program.placeholders, strict=True) if n.name in rows),
        default=1,
    )

    def chosen(index: list[int]) -> list[torch.Tensor]:
        batch = [
            tensor[index] if node.name in rows and tensor.shape[0] == count else tensor
            for tensor, node in zip(tensors, program.placeholders, strict=True)
        ]
        values: tuple[torch.Tensor, ...] = run(program.model, *batch)
        return list(values)

    with preserved(program.model), torch.no_grad():
        program.model.eval()
        whole = chosen(list(range(count)))
        for row in range(count):
            # Twice the same row: a single one could take another path through a kernel.
            alone = chosen([row, row])
            for node, value, reference in zip(prefix.values, alone, whole, strict=True):
                if relative_error(value[0], reference[row]) > rounding_bound(program):
                    return node.name
    return None


def _hoisted(program: Program, frozen: Collection[str]) -> set[fx.Node]:
    named = dict(program.model.named_parameters(remove_duplicate=False))
    fixed = {id(named[name]) for name in frozen}

    def is_fixed(module: nn.Module) -> bool:
        return all(id(parameter) in fixed for parameter in module.parameters())

    hoisted: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "output" or not all(item in hoisted for item in node.all_input_nodes):
            continue
        if node.op == "get_attr":
            parent, _, attribute = str(node.target).rpartition(".")
            value = getattr(program.module(parent), attribute)
            if isinstance(value, nn.Parameter) and id(value) not in fixed:
                continue
        elif node.op == "call_module":
            if not is_fixed(program.module(str(node.target))):
                continue
        elif is_uncontrolled(node) or _overwrites(node):
            continue
        hoisted.add(node)
    return hoisted


def _overwrites(node: fx.Node) -> bool:
    """Say whether a node writes to a value that somebody else reads too."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    written = node.all_input_nodes[0]
    return written.op in ("get_attr", "placeholder") or len(written.users) > 1


def _is_read_outside(node: fx.Node, hoisted: Collection[fx.Node]) -> bool:
    return (
        node in hoisted
        and node.op in ("call_function", "call_module")
        and isinstance(node.meta.get("val"), torch.Tensor)
        and any(user not in hoisted for user in node.users)
    )


def _ancestors(*nodes: fx.Node, through_sizes: bool = True) -> set[fx.Node]:
    """Return nodes with all that they depend on; without what gives them sizes only, if asked."""
    found, pending = set(nodes), list(nodes)
    while pending:
        node = pending.pop()
        if not through_sizes and not tensors_of(node.meta.get("val")):
            continue
        for item in node.all_input_nodes:
            if item not in found:
                found.add(item)
                pending.append(item)
    return found


def packed_dim(program: Program, node: fx.Node) -> int | None:
    """Return the dimension of a value over the real tokens of all samples, None if it has none."""
    symbols = {_symbol(item, 0) for item in program.graph.nodes if item.target is real_rows}
    dims = [
        dim
        for dim in range(len(shape_of(node)))
        if (symbol := _symbol(node, dim)) is not None and symbol in symbols
    ]
    return dims[0] if len(dims) == 1 else None


def _symbol(node: fx.Node, dim: int) -> str | None:
    """Return the symbol of a dimension of a node, None if it has another size."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() <= dim:
        return None
    size = value.shape[dim]
    if isinstance(size, int) or not size.node.expr.is_symbol:
        return None
    return str(size)


def _descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(nodes)
    pending = list(nodes)
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found


def has_rows(node: fx.Node) -> bool:
    """Say whether the first dimension of a value is dynamic: one row for each sample."""
    return _symbol(node, 0) is not None


def token_dim(program: Program, node: fx.Node) -> int | None:
    """Return the dimension of a value over the padding input's tokens, None if it has none."""
    name = padding_input(program)
    places = row_places(program, name) if name is not None else None
    place = places.place(node) if places is not None else None
    return place.token if place is not None and place.batch == 0 and place.token != 0 else None
