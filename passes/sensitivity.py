"""How much the model's outputs depend on each row of a value inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from .program import Program, compile_graph

Rows = tuple[list[torch.Tensor], torch.Tensor]
"""The values of some nodes, and the gradients [..., outputs] at the place."""


def sensitivity_function(
    program: Program, nodes: Sequence[fx.Node], place: fx.Node
) -> Callable[..., Rows]:
    """Return a function from the model, its input tensors and a padding mask to `Rows`.

    The gradient is that of one random projection of all float outputs with respect to the value
    of `place`; its mean outer product estimates the output metric of a change there, as in the
    empirical Fisher matrix. Nothing before `place` is differentiated.

    Args:
        program: The program as it is now.
        nodes: Nodes whose values are returned too; all before `place` or equal to its inputs.
        place: A tensor node, with channels last or, for images, in dimension 1.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    leaf: fx.Node | None = None
    for node in program.graph.nodes:
        if node.op == "output":
            break
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node is place:
            leaf = graph.call_function(_leaf, (copies[node],))
            copies[node] = graph.call_function(torch.clone, (leaf,))
    results = [
        copies[node]
        for node in program.result.all_input_nodes
        if isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].is_floating_point()
    ]
    graph.output(([copies[node] for node in nodes], leaf, results))
    run = compile_graph(graph)

    def function(
        model: torch.nn.Module, tensors: Sequence[torch.Tensor], mask: torch.Tensor | None
    ) -> Rows:
        with torch.no_grad():
            values, at, outputs = run(model, *tensors)
            with torch.enable_grad():
                generator = torch.Generator().manual_seed(0)
                projection = torch.stack(
                    [
                        (output * _signs(output, mask, generator)).sum()
                        for output in outputs
                        if output.requires_grad
                    ]
                ).sum()
            (gradient,) = torch.autograd.grad(projection, at)
        return values, gradient

    return function


def reaches_outputs(program: Program, place: fx.Node) -> bool:
    """Say whether a float output depends on a node's value through differentiable operations."""
    reached = {place}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        if floats and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return any(node in reached for node in program.result.all_input_nodes)


def _leaf(value: torch.Tensor) -> torch.Tensor:
    """Start recording gradients at this value; the caller's `no_grad` ends it."""
    torch._C._set_grad_enabled(True)
    return value.detach().requires_grad_(True)


def _signs(
    output: torch.Tensor, mask: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """Return random signs, 0 where the output belongs to padding."""
    signs = (torch.randint(0, 2, output.shape, generator=generator) * 2 - 1).to(output)
    if mask is not None and output.shape[: mask.dim()] == mask.shape:
        signs *= mask.reshape(*mask.shape, *[1] * (output.dim() - mask.dim())).to(output)
    return signs
