"""Measured times of the contractions that a group of channels runs through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from .axes import Axes, ChannelGroup, axes_of
from .contractions import operation_of
from .costs import Costs
from .latency import Comparison, weaker
from .latency_curve import LatencyCurve, anchor_sizes
from .program import Program, hint
from .workload import Workload, stand_in


def compare_sizes(
    program: Program, group: ChannelGroup, size: int, costs: Costs, *, training: bool
) -> Comparison | None:
    """Time all contractions that produce or consume a group's units, now and at another size.

    Every operation runs alone, on random numbers of the captured shapes, at a few sizes of the
    group; in between, times are interpolated. Equal shapes are measured once (`Costs`).

    Args:
        program: The program.
        group: The group.
        size: How many units it would have.
        costs: Measures and remembers.
        training: Time forward and backward, else forward.

    Returns:
        The sums over the operations, None if none of them can be run alone.
    """
    curves: list[LatencyCurve] = program.fact(
        f"times of {group.key} in {costs.runner.name}, training {training}",
        lambda program: _curves(program, group, costs, training),
    )
    if not curves:
        return None
    times = [curve(size) for curve in curves]
    dense_ms = sum(item.dense_ms for item in times)
    candidate_ms = sum(item.candidate_ms for item in times)
    return Comparison(
        dense_ms=dense_ms,
        candidate_ms=candidate_ms,
        ratio=dense_ms / candidate_ms,
        source=weaker(*(item.source for item in times)),
        decided=any(item.decided for item in times),
    )


def _curves(
    program: Program, group: ChannelGroup, costs: Costs, training: bool
) -> list[LatencyCurve]:
    """Return the times of every contraction of a group over the group's size."""
    axes = axes_of(program)
    fixed = {site.node for site in axes.sites}
    curves = []
    for operation in _operations(group):
        if operation not in fixed:
            dense = _workload(axes, operation, {})
            sizes = {
                size: _workload(axes, operation, {group.axis: size})
                for size in anchor_sizes(group.size)
            }
            compared = {
                size: costs.compare(dense, work, training=training) for size, work in sizes.items()
            }
            curves.append(LatencyCurve(compared, group.size))
    return curves


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


def _workload(axes: Axes, operation: fx.Node, sizes: Mapping[int, int]) -> Workload:
    """Return one operation on shapes; what it reads of the model are parameters of its own."""
    root, graph = nn.Module(), fx.Graph()
    operands: dict[fx.Node, fx.Node] = {}
    inputs: list[torch.Tensor] = []
    for index, source in enumerate(operation.all_input_nodes):
        value: torch.Tensor = source.meta["val"]
        shape = [_size(axes, source, dim, sizes) for dim in range(value.dim())]
        empty = stand_in(value, shape)
        name = f"operand_{index}"
        if source.op == "get_attr":
            trained = value.is_floating_point()
            root.register_parameter(name, nn.Parameter(empty, requires_grad=trained))
            operands[source] = graph.get_attr(name)
        else:
            inputs.append(empty)
            operands[source] = graph.placeholder(name)
    args, kwargs = fx.map_arg((operation.args, operation.kwargs), operands.__getitem__)
    assert callable(operation.target)
    graph.output(graph.call_function(operation.target, args, kwargs))
    return Workload(fx.GraphModule(root, graph), tuple(inputs))


def _size(axes: Axes, node: fx.Node, dim: int, sizes: Mapping[int, int]) -> int:
    new = axes.sizes_with(node, dim, sizes)
    return hint(node.meta["val"].shape[dim]) if new == axes.sizes_with(node, dim, {}) else new
