"""Rewriting a graph so that what only a loss reads runs at tokens with a label only."""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from graphopt.kernels.packed_rows import unpack_rows
from graphopt.kernels.token_positions import labelled_rows
from graphopt.kernels.token_rows import gather_rows

from .axis_flow import arguments_of
from .demand import LabelDemand
from .packed_graph import run_packed
from .packing import Packing
from .program import Program, compile_values, shape_of
from .propagation import refresh
from .row_places import RowPlaces
from .structure import flatten

_NOT_EQUAL = torch.ops.aten.ne.Scalar
_RESHAPE = torch.ops.aten.reshape.default
_SIZE = torch.ops.aten.sym_size.int


def run_labelled(
    program: Program, places: RowPlaces, demand: LabelDemand, packing: Packing
) -> None:
    """Let the nodes of a packing run at tokens with a label, and the loss read just those.

    Other outputs made of these nodes come back with zeros elsewhere.
    """
    rows = next(
        node for node in program.placeholders if (found := places.place(node)) and found.batch == 0
    )
    mask = _label_mask(program, demand, rows)
    refresh(program)
    count = _labels_in_example(program, mask)
    run_packed(program, packing, mask, marks_real=True, rows=count, select=labelled_rows)
    _read_rows(program, demand)
    program.changed()


def _labels_in_example(program: Program, mask: fx.Node) -> int:
    """Return how many tokens of the example have a label; all where it has no values."""
    tensors, _ = flatten(program.example)
    if any(tensor.is_meta for tensor in tensors):
        return prod(shape_of(mask))
    (found,) = compile_values(program, [mask])(program.model, *tensors)
    return int(found.sum())


def _label_mask(program: Program, demand: LabelDemand, rows: fx.Node) -> fx.Node:
    """Compute which tokens have a label [batch, token], right after the inputs."""
    graph = program.graph
    needed, pending = {demand.target}, [demand.target]
    while pending:
        for item in pending.pop().all_input_nodes:
            if item.op != "placeholder" and item not in needed:
                needed.add(item)
                pending.append(item)
    last = program.placeholders[-1]
    for node in [node for node in graph.nodes if node in needed]:
        last.append(node)
        last = node
    scope = {"modules": ("",), "calls": ("",)}
    with graph.inserting_after(last):
        differs = graph.call_function(_NOT_EQUAL, (demand.target, demand.ignored))
    with graph.inserting_after(differs):
        samples = graph.call_function(_SIZE, (rows, 0))
    with graph.inserting_after(samples):
        mask = graph.call_function(_RESHAPE, (differs, [samples, -1]))
    for node in (differs, samples, mask):
        node.meta = dict(scope)
    return mask


def _read_rows(program: Program, demand: LabelDemand) -> None:
    """Give the loss the labelled rows, and their targets."""
    graph, loss = program.graph, demand.loss
    rows = arguments_of(loss)["self"]
    source = rows
    while source.target is not unpack_rows and source.op == "call_function":
        source = source.all_input_nodes[0]
    packed, index = source.args[0], source.args[1]
    assert isinstance(packed, fx.Node)
    assert isinstance(index, fx.Node)
    with graph.inserting_before(loss):
        inputs = graph.call_function(_RESHAPE, (packed, [-1, shape_of(rows)[-1]]))
        targets = graph.call_function(gather_rows, (demand.target, index))
    for node in (inputs, targets):
        node.meta = {"modules": loss.meta["modules"], "calls": loss.meta["calls"]}
    loss.replace_input_with(rows, inputs)
    loss.replace_input_with(demand.target, targets)
    for node in (rows, *_views_of(rows, source), source):
        if not node.users and node.op == "call_function":
            graph.erase_node(node)


def _views_of(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """Return what lies between a view and the value that it looks at, both left out."""
    found: list[fx.Node] = []
    while node is not source:
        node = node.all_input_nodes[0]
        if node is not source:
            found.append(node)
    return found
