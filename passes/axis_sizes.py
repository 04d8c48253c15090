"""New axis sizes written into a program: static sizes in the graph, recorded shapes, attributes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from .axes import Axes, axes_of
from .axis_flow import Site, Terms, tensors_of
from .axis_terms import Product, Term, normal, size_of
from .program import Program

Sizes = Mapping[int, int]
"""New sizes of axes, by their number in `axes_of(program)`."""


def attributes_with(program: Program, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Return the module attributes that must follow new axis sizes, with their new values.

    Modules keep sizes in integers (`split_size`, `groups`, `in_features`) that their own code
    reads. An attribute counts as such a size if its name says so (that of the operator's argument;
    `in_` or `out_` for a weight), or if everything in that module's code that has its value changes
    in the same way. Positions (`layer_idx`) are not sizes. Call it before `resize_arguments`.

    Args:
        program: The program, before its graph is edited.
        sizes: New sizes of axes.

    Returns:
        Per module name the attributes with their new values.
    """
    axes = axes_of(program)
    named = _named_for_weights(program, axes, sizes)
    values: dict[str, dict[int, set[int]]] = {}

    def note(module: str, old: int, new: int) -> None:
        values.setdefault(module, {}).setdefault(old, set()).add(new)

    for site in axes.sites:
        old = _argument(site)
        if isinstance(old, int):
            new = size_of(site.term, sizes)
            if vars(program.module(site.module)).get(site.argument) == old:
                named.setdefault(site.module, {})[site.argument] = new
            note(site.module, abs(old), new)
    for _, _, parts, module in axes.splits:
        for part in parts:
            note(module, size_of(part), size_of(part, sizes))
    for name in axes.parameters:
        for term in axes.parameter(name):
            note(name.rpartition(".")[0], size_of(term), size_of(term, sizes))
    result: dict[str, dict[str, int]] = {}
    for module, found in values.items():
        for attribute, value in vars(program.module(module)).items():
            if type(value) is not int or attribute.endswith(("idx", "index", "_id")):
                continue
            choices = found.get(value, {value})
            agreed = min(choices) if len(choices) == 1 else value
            new = named.get(module, {}).get(attribute, agreed)
            if new != value:
                result.setdefault(module, {})[attribute] = new
    return result


def _named_for_weights(program: Program, axes: Axes, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Return attributes named for what a weight consumes (`in_features`) and produces."""
    result: dict[str, dict[str, int]] = {}
    for group in axes.groups():
        for member in group.members if group.axis in sizes else ():
            prefix = {"consumer": "in_", "producer": "out_"}.get(member.role)
            term = axes.parameter(member.parameter)[member.dim]
            module = member.parameter.rpartition(".")[0]
            for attribute, value in vars(program.module(module)).items():
                if prefix and attribute.startswith(prefix) and value == size_of(term):
                    result.setdefault(module, {})[attribute] = size_of(term, sizes)
    return result


def resize_arguments(program: Program, sizes: Sizes) -> None:
    """Rewrite every static size in the graph, and every recorded shape, for new axis sizes.

    Sizes of -1 and purely symbolic ones stay; a symbolic one times a static one is scaled.
    Parameters and attributes are not touched. The caller slices and sets them, and calls
    `program.changed()`.

    Args:
        program: The program whose graph is edited.
        sizes: New sizes of axes.
    """
    axes = axes_of(program)
    for site in axes.sites:
        old = _argument(site)
        if isinstance(old, int):
            new = site.sign * size_of(site.term, sizes)
            if old != new:
                _set_argument(site, new)
        elif isinstance(old, fx.Node):
            _set_argument(site, _scaled(site.node, old, site.term, sizes))
    for node, dim, parts, _ in axes.splits:
        if any(size_of(part) != size_of(part, sizes) for part in parts):
            node.target = torch.ops.aten.split_with_sizes.default
            node.args = (node.args[0], [size_of(part, sizes) for part in parts], dim)
            node.kwargs = {}
    _resize_values(axes, sizes)


def _resize_values(axes: Axes, sizes: Sizes) -> None:
    for node, found in axes.nodes.items():
        dims = [found] if isinstance(found, tuple) else found
        if any(size_of(t) != size_of(t, sizes) for item in dims for t in item):
            node.meta["val"] = _resized(node.meta["val"], dims, sizes)


def _scaled(user: fx.Node, size: fx.Node, term: Term, sizes: Mapping[int, int]) -> fx.Node:
    """Return a symbolic size (batch times heads) with the sizes of its static factors replaced."""
    term = normal(term)
    factors = term.factors if isinstance(term, Product) else (term,)
    changed = [(size_of(item), size_of(item, sizes)) for item in factors]
    old = prod(before for before, after in changed if before != after)
    new = prod(after for before, after in changed if before != after)
    if old == new == 1:
        return size
    graph, value = user.graph, size.meta["val"]
    with graph.inserting_before(user):
        if size.target is operator.mul and isinstance(size.args[1], int) and not size.args[1] % old:
            rest = size.args[0], size.args[1] // old * new
        else:
            divided = graph.call_function(operator.floordiv, (size, old))
            divided.meta = {**size.meta, "val": value // old}
            rest = divided, new
        result = graph.call_function(operator.mul, rest)
    result.meta = {**size.meta, "val": value // old * new}
    return result


def _position(site: Site) -> int:
    assert isinstance(site.node.target, torch._ops.OpOverload)
    names = [item.name for item in site.node.target._schema.arguments]
    return names.index(site.argument)


def _argument(site: Site) -> Any:
    index, node = _position(site), site.node
    value: Any = node.args[index] if index < len(node.args) else node.kwargs.get(site.argument)
    if site.position is not None and value is not None:
        value = value[site.position]
    return value


def _set_argument(site: Site, new: int | fx.Node) -> None:
    index, node = _position(site), site.node
    positional = index < len(node.args)
    value: Any = new
    if site.position is not None:
        value = list(node.args[index] if positional else node.kwargs[site.argument])  # type: ignore[arg-type]
        value[site.position] = new
    if positional:
        node.update_arg(index, value)
    else:
        node.update_kwarg(site.argument, value)


def _resized(value: Any, dims: list[Terms], sizes: Mapping[int, int]) -> Any:
    """Return recorded values of new shapes: a tensor, or as many as there are lists of terms."""

    def dimension(size: int | torch.SymInt, term: Term) -> int | torch.SymInt:
        new = size_of(term, sizes)
        return size if new == size_of(term) else new

    results = [
        tensor.new_empty([dimension(*pair) for pair in zip(tensor.shape, item, strict=True)])
        for tensor, item in zip(tensors_of(value), dims, strict=True)
    ]
    return results[0] if isinstance(value, torch.Tensor) else type(value)(results)
