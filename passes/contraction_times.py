"""Measured times of the contractions that a group of channels runs through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from .axes import Axes, ChannelGroup, axes_of
from .contractions import operation_of
from .costs import Comparison, Costs
from .program import Program, hint


def compare_sizes(
    program: Program, group: ChannelGroup, size: int, costs: Costs, *, training: bool
) -> Comparison | None:
    """Time all contractions that produce or consume a group's units, now and at another size.

    Every operation runs alone, on random numbers of the captured shapes; equal shapes are measured
    once (`Costs`).

    Args:
        program: The program.
        group: The group.
        size: How many units it would have.
        costs: Measures and remembers.
        training: Time forward and backward, else forward.

    Returns:
        The sums over the operations, None if none of them can be run alone.
    """
    axes = axes_of(program)
    fixed = {site.node for site in axes.sites}
    times = [
        costs.compare_modules(
            _module(axes, operation, {}),
            _module(axes, operation, {group.axis: size}),
            (1,),
            torch.float32,
            training=training,
        )
        for operation in _operations(group)
        if operation not in fixed
    ]
    if not times:
        return None
    dense_ms = sum(item.dense_ms for item in times)
    candidate_ms = sum(item.candidate_ms for item in times)
    return Comparison(dense_ms=dense_ms, candidate_ms=candidate_ms, ratio=dense_ms / candidate_ms)


def _operations(group: ChannelGroup) -> Iterator[fx.Node]:
    """Yield the operations whose operands are all tensors with recorded shapes."""
    for member in (*group.of("producer"), *group.of("consumer")):
        for node in member.nodes:
            operation = operation_of(node, member.parameter)
            if operation is not None and all(
                isinstance(source.meta.get("val"), torch.Tensor)
                for source in operation.all_input_nodes
            ):
                yield operation


def _module(axes: Axes, operation: fx.Node, sizes: Mapping[int, int]) -> nn.Module:
    """Return a module on the meta device that runs one operation on operands of its own."""
    root, graph = nn.Module(), fx.Graph()
    graph.placeholder("unused")
    operands: dict[fx.Node, fx.Node] = {}
    for index, source in enumerate(operation.all_input_nodes):
        value: torch.Tensor = source.meta["val"]
        shape = [_size(axes, source, dim, sizes) for dim in range(value.dim())]
        empty = torch.empty(shape, dtype=value.dtype, device="meta")
        root.register_parameter(
            f"operand_{index}", nn.Parameter(empty, requires_grad=value.is_floating_point())
        )
        operands[source] = graph.get_attr(f"operand_{index}")
    args, kwargs = fx.map_arg((operation.args, operation.kwargs), operands.__getitem__)
    assert callable(operation.target)
    graph.output(graph.call_function(operation.target, args, kwargs))
    return fx.GraphModule(root, graph)


def _size(axes: Axes, node: fx.Node, dim: int, sizes: Mapping[int, int]) -> int:
    new = axes.sizes_with(node, dim, sizes)
    return hint(node.meta["val"].shape[dim]) if new == axes.sizes_with(node, dim, {}) else new
