"""FLOPs and parameters that a program would have with other axis sizes, nothing changed yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import fx

from .axes import Axes, axes_of
from .axis_terms import size_of
from .facts import facts_of
from .program import Program


def flops_with(program: Program, sizes: Mapping[int, int]) -> int:
    """Return the forward FLOPs of the whole program when axes, by number, have other sizes.

    Every contraction is a product of sizes, so its FLOPs scale by the sizes of the weight's
    dimensions; without a weight, by those of the result and of the contracted dimension.
    """
    axes = axes_of(program)
    facts = facts_of(program)
    total = 0.0
    for node in program.graph.nodes:
        flops = facts.nodes[node].forward_flops if node in facts.nodes else 0
        if flops:
            total += flops * _ratio(axes, program, node, sizes)
    return round(total)


def parameters_with(program: Program, sizes: Mapping[int, int]) -> int:
    """Return how many parameters the program reads when axes, by number, have other sizes."""
    axes = axes_of(program)
    return sum(
        prod(size_of(term, sizes) for term in axes.parameter(name))
        for name in facts_of(program).weights
    )


def _ratio(axes: Axes, program: Program, node: fx.Node, sizes: Mapping[int, int]) -> float:
    body: fx.Graph | None = node.meta.get("body")
    operations: Iterable[fx.Node] = body.nodes if body is not None else (node,)
    largest, ratio = -1, 1.0
    for operation in operations:
        if operation.op != "call_function" or not isinstance(
            operation.meta.get("val"), torch.Tensor
        ):
            continue
        weights = [
            n
            for n in operation.all_input_nodes
            if n.op == "get_attr" and isinstance(n.meta["val"], torch.Tensor)
        ]
        work = max((n.meta["val"].numel() for n in weights), default=0)
        if work <= largest:
            continue
        largest = work
        ratio = _operation_ratio(axes, operation, weights, sizes)
    return ratio


def _operation_ratio(
    axes: Axes, operation: fx.Node, weights: list[fx.Node], sizes: Mapping[int, int]
) -> float:
    if weights:
        weight = max(weights, key=lambda n: int(n.meta["val"].numel()))
        terms = axes.parameter(str(weight.target))
    else:
        first = next(n for n in operation.all_input_nodes if n in axes.nodes)
        terms = (*axes.term(operation), axes.term(first)[-1])
    return prod(size_of(term, sizes) / size_of(term) for term in terms)
