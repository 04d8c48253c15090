"""Axis rules of operators that move elements: views, joins, cuts and lookups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from .axis_contractions import unknown
from .axis_flow import Arguments, Flow, Terms, operator_name, rule, value_of
from .axis_terms import ONE, Product, Sum, Term, product_of
from .program import hint


def dimensions(value: Any, rank: int) -> list[int]:
    """Return a `dim` argument as non-negative numbers; None or an empty list means all."""
    if value is None or value == []:
        return list(range(rank))
    return [item % rank for item in (value if isinstance(value, (list, tuple)) else [value])]


@rule("permute", "transpose", "t", "movedim", "swapaxes", "mT", "numpy_T", "adjoint")
def reorder(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Reorder dimensions."""
    dims = list(flow.dims(a["self"]))
    name, rank = operator_name(node), len(dims)
    if name == "permute":
        return tuple(dims[i] for i in dimensions(a["dims"], rank))
    if name == "movedim":
        targets, origins = dimensions(a["destination"], rank), dimensions(a["source"], rank)
        moved = dict(zip(targets, origins, strict=True))
        rest = iter(i for i in range(rank) if i not in moved.values())
        return tuple(dims[moved[i] if i in moved else next(rest)] for i in range(rank))
    if name == "numpy_T":
        return tuple(reversed(dims))
    if name in ("t", "mT", "adjoint"):
        first, second = rank - 2, rank - 1
    else:
        first, second = (a[k] % rank for k in a if k in ("dim0", "dim1", "axis0", "axis1"))
    if rank > 1:
        dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


@rule(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_as",
    "reshape_as",
    "_reshape_alias",
)
def reshape(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Split and merge dimensions: those that enumerate the same elements form groups."""
    source = a["self"]
    if "dtype" in a:
        return unknown(flow, node, a)
    before, after = flow.dims(source), value_of(node).shape
    result = _regroup(flow, before, value_of(source).shape, after)
    for argument in ("size", "shape", "sizes"):
        if argument in a:
            skip = a["dim"] % len(before) if operator_name(node) == "unflatten" else 0
            flow.sizes(node, argument, a[argument], result[skip:])
    return result


def _regroup(flow: Flow, before: Terms, old: Sequence[Any], new: Sequence[Any]) -> Terms:
    cuts = _cuts(old, new, _same_size) or _cuts(old, new, lambda *_: True)
    result: list[Term] = []
    for left, right in cuts or [(range(len(old)), range(len(new)))]:
        if len(left) == len(right) == 1:
            result.append(before[left[0]])
            continue
        fresh = [flow.new_dim(new[i]) for i in right]
        flow.unify(product_of([before[i] for i in left]), product_of(fresh))
        result.extend(fresh)
    return tuple(result)


def _same_size(old: Sequence[Any], new: Sequence[Any]) -> bool:
    """Return whether two lists of sizes have the same product at every size of a dynamic one."""
    sides = [[size if isinstance(size, int) else size.node.expr for size in s] for s in (old, new)]
    return bool(prod(sides[0]) == prod(sides[1]))


def _cuts(
    old: Sequence[Any], new: Sequence[Any], accept: Callable[[Sequence[Any], Sequence[Any]], bool]
) -> list[tuple[range, range]] | None:
    """Return the finest groups of dimensions with equal products, None if the end does not fit."""
    groups: list[tuple[range, range]] = []
    i = j = first = second = 0
    while i < len(old) or j < len(new):
        left, right = prod(map(hint, old[first:i])), prod(map(hint, new[second:j]))
        if i > first and j > second and left == right and accept(old[first:i], new[second:j]):
            groups.append((range(first, i), range(second, j)))
            first, second = i, j
        elif i < len(old) and (left <= right or j == len(new)):
            i += 1
        else:
            j += 1
    tail = old[first:], new[second:]
    if prod(map(hint, tail[0])) != prod(map(hint, tail[1])) or not accept(*tail):
        return None
    if first < len(old) or second < len(new):
        groups.append((range(first, len(old)), range(second, len(new))))
    return groups


@rule("expand", "broadcast_to")
def expand(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Repeat dimensions of size 1 without copying; every repetition is a unit of a new axis."""
    dims, shape = flow.dims(a["self"]), value_of(node).shape
    padded = (ONE,) * (len(shape) - len(dims)) + dims
    result = tuple(
        flow.new_dim(size) if term == ONE else term
        for term, size in zip(padded, shape, strict=True)
    )
    flow.sizes(node, "size", a["size"], result)
    return result


@rule("repeat", "tile")
def repeat(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Repeat dimensions as a whole."""
    dims, shape = flow.dims(a["self"]), value_of(node).shape
    name = "repeats" if "repeats" in a else "dims"
    counts = [1] * (len(shape) - len(a[name])) + list(a[name])
    padded = (ONE,) * (len(shape) - len(dims)) + dims
    result: list[Term] = []
    for i, (count, term, size) in enumerate(zip(counts, padded, shape, strict=True)):
        if count == 1:
            result.append(term)
        elif isinstance(count, int):
            copies = flow.fresh(count)
            flow.site(node, name, copies, i - (len(shape) - len(a[name])))
            result.append(Product((copies, term)))
        else:
            result.append(flow.new_dim(size))
    return tuple(result)


@rule("repeat_interleave")
def repeat_interleave(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Repeat every unit of a dimension."""
    if not isinstance(a["repeats"], int) or a.get("dim") is None:
        return unknown(flow, node, a)
    dims = list(flow.dims(a["self"]))
    copies = flow.fresh(a["repeats"])
    flow.site(node, "repeats", copies)
    dim = a["dim"] % len(dims)
    dims[dim] = Product((dims[dim], copies))
    return tuple(dims)


@rule("cat", "concat", "concatenate")
def concatenate(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Put tensors one after the other along a dimension."""
    parts = [item for item in a["tensors"] if value_of(item).dim() == value_of(node).dim()]
    dims = [flow.dims(item) for item in parts]
    dim = a["dim"] % len(dims[0])
    rest = flow.broadcast([(*item[:dim], ONE, *item[dim + 1 :]) for item in dims])
    joined = dims[0][dim] if len(dims) == 1 else Sum(tuple(item[dim] for item in dims))
    return (*rest[:dim], joined, *rest[dim + 1 :])


@rule("stack")
def stack(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Put tensors one after the other along a new dimension."""
    dims = flow.broadcast([flow.dims(item) for item in a["tensors"]])
    dim = a["dim"] % (len(dims) + 1)
    new = flow.new_dim(value_of(node).shape[dim], f"is stacked by {flow.where(node)}")
    return (*dims[:dim], new, *dims[dim:])


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
def split(flow: Flow, node: fx.Node, a: Arguments) -> list[Terms]:
    """Cut a dimension into parts."""
    dims = flow.dims(a["self"])
    dim = a["dim"] % len(dims)
    sizes = [value.shape[dim] for value in node.meta["val"]]
    if not all(map(is_concrete_int, sizes)):
        flow.pin(dims[dim], f"is cut by {flow.where(node)}")
    parts = tuple(flow.new_dim(size) for size in sizes)
    flow.unify(dims[dim], Sum(parts))
    flow.splits.append((node, dim, parts, flow.module_of(node)))
    return [(*dims[:dim], part, *dims[dim + 1 :]) for part in parts]


@rule("glu")
def gated_linear_unit(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Multiply the first half of a dimension with the sigmoid of the second."""
    dims = flow.dims(a["self"])
    dim = a["dim"] % len(dims)
    half = flow.new_dim(value_of(node).shape[dim])
    flow.unify(dims[dim], Sum((half, half)))
    return (*dims[:dim], half, *dims[dim + 1 :])


@rule("slice", "narrow")
def take_range(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Keep a range of a dimension."""
    dims, shape = flow.dims(a["self"]), value_of(a["self"]).shape
    dim = a["dim"] % len(dims)
    size, kept = shape[dim], value_of(node).shape[dim]
    if str(size) == str(kept):
        return dims
    start = a.get("start") or 0
    fixed = is_concrete_int(size) and is_concrete_int(kept) and isinstance(start, int)
    if not fixed or a.get("step", 1) != 1:
        flow.pin(dims[dim], f"is sliced by {flow.where(node)}")
        new = flow.new_dim(kept, f"is a slice made by {flow.where(node)}")
        return (*dims[:dim], new, *dims[dim + 1 :])
    first = start + int(size) if start < 0 else start
    before, after = flow.new_part(first), flow.new_part(int(size) - first - int(kept))
    middle = flow.fresh(int(kept))
    flow.unify(dims[dim], Sum((*before, middle, *after)))
    end = a.get("end")
    if isinstance(a.get("start"), int):
        counted = Sum((middle, *after)) if start < 0 else Sum(before)
        flow.site(node, "start", counted, sign=-1 if start < 0 else 1)
    if "length" in a:
        flow.site(node, "length", middle)
    elif isinstance(end, int) and end < 0:
        flow.site(node, "end", Sum(after), sign=-1)
    elif isinstance(end, int) and end <= int(size):
        flow.site(node, "end", Sum((*before, middle)))
    return (*dims[:dim], middle, *dims[dim + 1 :])


@rule("select", "unbind")
def take_one(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Take units of a dimension by their position."""
    dims = flow.dims(a["self"])
    dim = a["dim"] % len(dims)
    flow.pin(dims[dim], f"is taken apart by position in {flow.where(node)}")
    rest = (*dims[:dim], *dims[dim + 1 :])
    value = node.meta["val"]
    return rest if isinstance(value, torch.Tensor) else [rest] * len(value)


@rule("index")
def index(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Gather by index tensors; the dimensions that are not indexed stay."""
    dims = list(flow.dims(a["self"]))
    place = flow.where(node)
    position = 0
    used: list[int] = []
    for item in a["indices"]:
        if item is None:
            position += 1
            continue
        value = value_of(item)
        mask = value.dtype in (torch.bool, torch.uint8)
        width = value.dim() if mask else 1
        used.extend(range(position, position + width))
        flow.pin(flow.dims(item), f"is an index in {place}")
        position += width
    flow.pin((dims[i] for i in used), f"is looked up by index in {place}")
    rest = [dims[i] for i in range(len(dims)) if i not in used]
    together = used == list(range(used[0], used[-1] + 1))
    count = value_of(node).dim() - len(rest)
    at = used[0] if together else 0
    sizes = value_of(node).shape[at : at + count]
    chosen = [flow.new_dim(size, f"is indexed by {place}") for size in sizes]
    return (*rest[:at], *chosen, *rest[at:])


@rule("index_select")
def index_select(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Gather along one dimension."""
    dims = flow.dims(a["self"])
    dim = a["dim"] % len(dims)
    place = f"is looked up by index in {flow.where(node)}"
    flow.pin(dims[dim], place)
    return (*dims[:dim], flow.new_dim(value_of(node).shape[dim], place), *dims[dim + 1 :])
