"""Where a model's graph holds the size of its images: tables of positions, and sizes as numbers.

before: h = patches.flatten(2).transpose(1, 2) + table;              q = view(h, [batch, 49, 4, 8])
after:  h = patches.flatten(2).transpose(1, 2) + grid(table, patches);  view(h, [batch, -1, 4, 8])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.kernels.position_grid import PositionGrid
from graphopt.passes.axes import axes_of
from graphopt.passes.axis_flow import operator_name, tensor_nodes
from graphopt.passes.axis_terms import Axis, Product, Sum, Term, atoms, normal, size_of
from graphopt.passes.errors import PlanError
from graphopt.passes.program import Program, shape_of
from graphopt.passes.token_route import sizes_argument

from .block_gates import show_argument

_ADDS = ("add", "add_")
_BROADCASTS = ("expand", "broadcast_to")


@dataclass(frozen=True)
class PositionTable:
    """A value without inputs, with a vector for every place on a grid, that is added to patches.

    Attributes:
        node: The table [.., before + rows * columns + after, ..].
        reader: What adds it.
        patches: The value that has the grid as two dimensions.
        axes: The numbers of the grid's axes in `axes_of(program)`.
        module: What fits the table to patches of another size.
    """

    node: fx.Node
    reader: fx.Node
    patches: fx.Node
    axes: frozenset[int]
    module: PositionGrid


def position_tables(program: Program, image: fx.Node) -> tuple[PositionTable, ...]:
    """Return the tables of positions on the grids of an image, in graph order."""
    axes = axes_of(program)
    shown = {image}
    fed = set(program.placeholders)
    grids: dict[tuple[int, int], tuple[fx.Node, tuple[int, int]]] = {}
    found: list[PositionTable] = []
    for node in program.graph.nodes:
        sources = tensor_nodes(node)
        if not fed.isdisjoint(sources):
            fed.add(node)
        if shown.isdisjoint(sources) or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        shown.add(node)
        for pair, dims in _grids(axes.term(node)):
            grids.setdefault(pair, (node, dims))
        if node.op == "call_function" and operator_name(node) in _ADDS:
            for source in sources:
                table = None if source in fed else _table(source, node, axes.term(source), grids)
                if table is not None:
                    found.append(table)
    return tuple(found)


def fit_tables(program: Program, tables: Sequence[PositionTable], prefix: str) -> None:
    """Let tables and sizes in the graph follow the size of the image.

    Sizes that stay as numbers (two of them in one list) fail on another size of the image.

    Args:
        program: The program; its graph and its model are edited.
        tables: The tables, as `position_tables` found them.
        prefix: What the names of their modules start with; a number follows.

    Raises:
        PlanError: if the model has a name already.
    """
    _free_sizes(program, frozenset().union(*(table.axes for table in tables)))
    for number, table in enumerate(tables):
        name = f"{prefix}{number}"
        if hasattr(program.model, name):
            raise PlanError(f"the model has something else called {name!r}")
        program.model.add_module(name, table.module.train(program.model.training))
        with program.graph.inserting_before(table.reader):
            fitted = program.graph.call_module(name, (table.node,), {"patches": table.patches})
        show_argument(fitted)
        table.reader.replace_input_with(table.node, fitted)
    program.changed()


def _grids(terms: Sequence[Term]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the pairs of axes that a value has as dimensions of their own, with these."""
    single = [
        (term.number, dim) for dim, term in enumerate(map(normal, terms)) if isinstance(term, Axis)
    ]
    return [
        ((row, column), (first, second))
        for index, (row, first) in enumerate(single)
        for column, second in single[index + 1 :]
    ]


def _table(
    node: fx.Node,
    reader: fx.Node,
    terms: Sequence[Term],
    grids: dict[tuple[int, int], tuple[fx.Node, tuple[int, int]]],
) -> PositionTable | None:
    """Return a value as a table over one of the grids, None if it is none."""
    found: list[PositionTable] = []
    for dim, term in enumerate(map(normal, terms)):
        parts = term.parts if isinstance(term, Sum) else (term,)
        for place, part in enumerate(parts):
            factors = part.factors if isinstance(part, Product) else ()
            numbers = [item.number for item in factors if isinstance(item, Axis)]
            if len(factors) != 2 or len(numbers) != 2 or (numbers[0], numbers[1]) not in grids:
                continue
            patches, patch_dims = grids[numbers[0], numbers[1]]
            shape = shape_of(patches)
            module = PositionGrid(
                dim=dim,
                before=sum(size_of(item) for item in parts[:place]),
                grid=(shape[patch_dims[0]], shape[patch_dims[1]]),
                patch_dims=patch_dims,
            )
            found.append(PositionTable(node, reader, patches, frozenset(numbers), module))
    return found[0] if len(found) == 1 else None


def _free_sizes(program: Program, grid: frozenset[int]) -> None:
    """Let views find out a size that follows the image, where it is the only such in its list."""
    counted: dict[fx.Node, list[int]] = {}
    for site in axes_of(program).sites:
        follows = any(axis.number in grid for axis in atoms(site.term))
        if follows and site.position is not None and site.node.graph is program.graph:
            counted.setdefault(site.node, []).append(site.position)
    for node, places in counted.items():
        sizes = sizes_argument(node)
        if sizes is None or len(places) > 1 or operator_name(node) in _BROADCASTS:
            continue
        known = node.meta["val"].shape
        sizes = [known[dim] if size == -1 else size for dim, size in enumerate(sizes)]
        sizes[places[0]] = -1
        if all(isinstance(size, (int, fx.Node)) for size in sizes):
            node.args = (node.args[0], sizes, *node.args[2:])
