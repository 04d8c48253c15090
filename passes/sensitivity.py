"""How much the model's outputs depend on each row of values inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx, nn

from .axis_flow import tensors_of
from .objective import Objective
from .program import Program, compile_graph

Rows = tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]
"""The values of some nodes, and the gradients at the places."""


def sensitivity_function(
    program: Program, nodes: Sequence[fx.Node], places: Sequence[fx.Node], objective: Objective
) -> Callable[[Sequence[torch.Tensor], int], Rows]:
    """Return a function from input tensors and a seed to `Rows`.

    The gradients are those of the objective's projection with respect to the values of the places;
    their mean outer product estimates the output metric of a change there (Gauss-Newton). Nothing
    before the first place is differentiated, and no parameter.

    Args:
        program: The program as it is now, in evaluation mode when the function runs.
        nodes: Nodes whose values are returned too.
        places: Tensor nodes, with channels last or, for images, in dimension 1.
        objective: What is projected.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    leaves: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            break
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in places:
            leaves[node] = graph.call_function(_leaf, (copies[node],))
            # What follows may write in place.
            copies[node] = graph.call_function(torch.clone, (leaves[node],))
    (results,) = program.result.args
    outputs = fx.map_arg(results, copies.__getitem__)
    graph.output(([copies[node] for node in nodes], [leaves[node] for node in places], outputs))
    run = compile_graph(graph)

    def function(tensors: Sequence[torch.Tensor], seed: int) -> Rows:
        with torch.no_grad(), _frozen(program.model):
            values, at, found = run(program.model, *tensors)
            with torch.enable_grad():
                projection = objective.projection(program, tensors, found, seed)
            gradients = torch.autograd.grad(projection, at, allow_unused=True)
        zeros = (
            torch.zeros_like(v) if g is None else g for g, v in zip(gradients, at, strict=True)
        )
        return [value.detach() for value in values], tuple(zeros)

    return function


def reaches_outputs(program: Program, place: fx.Node) -> bool:
    """Say whether a float output depends on a node's value through differentiable operations."""
    found: set[fx.Node] = program.fact("nodes that reach float outputs", _reaching)
    return place in found


def _reaching(program: Program) -> set[fx.Node]:
    reaching = {*program.result.all_input_nodes}
    for node in reversed(program.graph.nodes):
        if node in reaching and _is_float(node):
            reaching.update(node.all_input_nodes)
    return {node for node in reaching if _is_float(node)}


def _is_float(node: fx.Node) -> bool:
    return any(value.is_floating_point() for value in tensors_of(node.meta.get("val")))


def _leaf(value: torch.Tensor) -> torch.Tensor:
    """Record gradients from this value on; the caller's `no_grad` ends it."""
    torch._C._set_grad_enabled(True)
    return value if value.requires_grad else value.detach().requires_grad_(True)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Record nothing for parameters: their gradients would need all inputs of all layers."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
