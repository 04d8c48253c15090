"""Hidden units in an order that gathers what matters in few blocks of their sparse matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from graphopt.passes.axes import ChannelGroup, Member, axes_of
from graphopt.passes.compress.block_details import BlockSizes, Units
from graphopt.passes.linear_layers import LinearLayer
from graphopt.passes.program import Program
from graphopt.passes.unit_order import UnitMatrix, best_order


@dataclass
class SparseMatrix:
    """The weight of a layer that is to be sparse, in the order found so far.

    Attributes:
        matrix: W [out, in] in its present order.
        power: Mean square of every input in that order [in]: what an element's square weighs.
        sizes: Its blocks.
        rows: The original row at every place [out].
        columns: The original column at every place [in].
    """

    matrix: torch.Tensor
    power: torch.Tensor
    sizes: BlockSizes
    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, matrix: torch.Tensor, power: torch.Tensor, sizes: BlockSizes) -> SparseMatrix:
        """Return a weight in its original order."""
        rows, columns = (torch.arange(size, device=matrix.device) for size in matrix.shape)
        return cls(matrix.double(), power.double(), sizes, rows, columns)

    def reorder_rows(self, source: torch.Tensor) -> None:
        """Put the row `source[i]` at place i."""
        self.matrix, self.rows = self.matrix[source], self.rows[source]

    def reorder_columns(self, source: torch.Tensor) -> None:
        """Put the column `source[i]` at place i."""
        self.matrix, self.columns = self.matrix[:, source], self.columns[source]
        self.power = self.power[source]

    def units(self, member: Member) -> UnitMatrix:
        """Return what the search for an order sees of the matrix."""
        rows = member.role == "producer"
        energy = self.matrix.square() * self.power
        out, inputs = energy.shape
        tile, group = self.sizes.block_out, self.sizes.block_in
        summed = (
            energy.view(out, inputs // group, group).sum(2)
            if rows
            else energy.view(out // tile, tile, inputs).sum(1).t()
        )
        return UnitMatrix(
            energy=summed.cpu().numpy(),
            units=np.array(member.units()),
            block=tile if rows else group,
            kept=self.sizes.blocks * tile // out,
            rows=rows,
        )


def reorderings(
    program: Program, layers: Mapping[str, LinearLayer], sizes: Mapping[str, BlockSizes]
) -> dict[str, tuple[Units, ...]]:
    """Return the hidden units that can be put in order, under the first layer that has them.

    Args:
        program: The program, all layers still dense.
        layers: Linear layers by name.
        sizes: Those of them that are to be sparse, in the order in which they become so.
    """
    result: dict[str, tuple[Units, ...]] = {}
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    for group in axes_of(program).groups():
        found = dict(_sparse_members(group, {name: layers[name] for name in sizes}))
        if group.kind != "hidden units" or group.placed or not found:
            continue
        if not _lies_between(group, order):
            continue
        units = Units(group=group.key, layers={name: sizes[name] for name in found})
        first = next(iter(found))
        result[first] = (*result.get(first, ()), units)
    return result


def reorder(
    program: Program,
    units: Units,
    layers: Mapping[str, LinearLayer],
    matrices: Mapping[str, SparseMatrix],
) -> tuple[ChannelGroup, list[int]] | None:
    """Put hidden units in the best order, in the matrices too; None if theirs is the best.

    Args:
        program: The program as it is now, all layers of the group still dense.
        units: Which.
        layers: Linear layers by name, all of `units` among them.
        matrices: Their weights; reordered in place.
    """
    group = axes_of(program).group(units.group)
    members = dict(_sparse_members(group, {name: layers[name] for name in units.layers}))
    order = best_order([matrices[name].units(member) for name, member in members.items()])
    if order is None:
        return None
    chosen = order.tolist()
    for name, member in members.items():
        matrix = matrices[name]
        source = torch.tensor(member.reordered(chosen), device=matrix.matrix.device)
        if member.role == "producer":
            matrix.reorder_rows(source)
        else:
            matrix.reorder_columns(source)
    return group, chosen


def _lies_between(group: ChannelGroup, order: Mapping[fx.Node, int]) -> bool:
    """Say whether all producers come before all consumers: in a residual stream they alternate."""
    made = [order[node] for member in group.of("producer") for node in member.nodes]
    used = [order[node] for member in group.of("consumer") for node in member.nodes]
    return bool(made and used) and max(made) < min(used)


def _sparse_members(
    group: ChannelGroup, layers: Mapping[str, LinearLayer]
) -> Iterator[tuple[str, Member]]:
    """Yield the layers whose weight has the group in one dimension, with that."""
    for name, layer in layers.items():
        found = [m for m in group.members if m.parameter == f"{name}.{layer.weight_name}"]
        if len(found) == 1 and found[0].role in ("producer", "consumer"):
            yield name, found[0]
