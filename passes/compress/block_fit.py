"""What a linear layer becomes: its units in order, its blocks chosen, their values fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphopt.passes.axes import ChannelGroup
from graphopt.passes.base import Change
from graphopt.passes.block_choice import (
    SparseFit,
    kept_as_they_are,
    magnitude_layout,
    obs_layout,
    repaired,
)
from graphopt.passes.calibration import Calibration
from graphopt.passes.compress.block_details import checked, present_layer
from graphopt.passes.compress.block_order import SparseMatrix, reorder
from graphopt.passes.gram import GramAccumulator
from graphopt.passes.linear_layers import LinearLayer
from graphopt.passes.program import Program
from graphopt.passes.sensitivity import reaches_outputs


@dataclass(frozen=True)
class BlockChoice:
    """The blocks of a layer, and the order of the units of the groups it belongs to.

    Attributes:
        fit: The blocks, in the order found.
        orders: Groups whose units change places, with the unit that comes at every place.
    """

    fit: SparseFit
    orders: tuple[tuple[ChannelGroup, list[int]], ...]


def choose_blocks(
    program: Program,
    change: Change,
    calibration: Calibration | None,
    *,
    by_obs: bool,
    damping: float | None,
) -> BlockChoice:
    """Choose and fit the blocks of a layer on the program as it is now.

    Args:
        program: The program; the layer is still dense.
        change: What is to be done to the layer.
        calibration: Data; without it blocks are chosen by magnitude and keep their values.
        by_obs: Whether data also scores; else magnitude does.
        damping: Ridge of the refit (see `repaired`), None for no refit.
    """
    details, layer = checked(program, change)
    layers, sizes = {change.target: layer}, {change.target: details.sizes}
    for units in details.units:
        sizes.update(units.layers)
        layers.update({name: present_layer(program, name) for name in units.layers})
    # How much inputs vary matters to the order of units only.
    ordered_by = calibration if details.units else None
    matrices = {
        name: SparseMatrix.of(item.matrix, _power(program, name, item, ordered_by), sizes[name])
        for name, item in layers.items()
    }
    orders = [reorder(program, units, layers, matrices) for units in details.units]
    known = _statistics(program, change.target, layer, calibration)
    fit = _fit(layer, matrices[change.target], known, by_obs=by_obs, damping=damping)
    return BlockChoice(fit, tuple(item for item in orders if item is not None))


@dataclass(frozen=True)
class _Statistics:
    """What is known of a layer: its inputs, uncentered without a bias, and its outputs' weights."""

    gram: GramAccumulator
    metric: torch.Tensor | None


def _statistics(
    program: Program, name: str, layer: LinearLayer, calibration: Calibration | None
) -> _Statistics | None:
    """Return the statistics of a layer, rows weighed by what the model's outputs lose."""
    if calibration is None:
        return None
    calls, nodes = program.calls(name), _inputs(program, name)
    if len(calls) == 1 and reaches_outputs(program, calls[0]):
        found = calibration.weighted_statistics(program, nodes[0], None, calls[0])
        gram, metric = found.gram, found.metric
    else:
        gram, metric = calibration.statistics(program, nodes), None
    return _Statistics(gram.uncentered() if layer.bias is None else gram, metric)


def _power(
    program: Program, name: str, layer: LinearLayer, calibration: Calibration | None
) -> torch.Tensor:
    """Return how much every input of a layer varies [in], the same for all without data."""
    if calibration is None:
        return layer.matrix.new_ones(layer.in_features)
    gram = calibration.statistics(program, _inputs(program, name))
    return (gram.uncentered() if layer.bias is None else gram).covariance.diagonal()


def _inputs(program: Program, name: str) -> list[tuple[fx.Node, int]]:
    return list(dict.fromkeys((node.all_input_nodes[0], -1) for node in program.calls(name)))


def _fit(
    layer: LinearLayer,
    order: SparseMatrix,
    statistics: _Statistics | None,
    *,
    by_obs: bool,
    damping: float | None,
) -> SparseFit:
    """Choose and fit the blocks of a layer in the order found for it."""
    matrix = layer.matrix[order.rows][:, order.columns]
    bias = None if layer.bias is None else layer.bias.detach()[order.rows]
    tile, group = order.sizes.block_out, order.sizes.block_in
    kept = order.sizes.blocks * tile // layer.out_features
    gram = None if statistics is None else statistics.gram.reordered(order.columns)
    if statistics is None or gram is None or not by_obs:
        layout = magnitude_layout(matrix, tile, group, kept)
    else:
        metric = statistics.metric
        if metric is not None:
            metric = metric[order.rows][:, order.rows]
        layout = obs_layout(matrix, gram.covariance, tile, group, kept, metric)
    if gram is None or damping is None:
        return kept_as_they_are(matrix, bias, layout, gram)
    return repaired(matrix, bias, layout, gram, damping)
