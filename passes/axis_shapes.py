"""Axis rules of element-wise, shape-changing, indexing, reducing and creating operators."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from .axis_contractions import unknown
from .axis_flow import Arguments, Flow, Terms, operator_name, rule, tensors_of, value_of
from .axis_terms import ONE, Product, Sum, Term, product_of, size_of
from .program import hint


@rule(
    "where", "masked_fill", "rsub", "hardswish", "log_sigmoid", "type_as", "expand_as",
    "copy", "floor_divide", "special_expit", "bernoulli", "fill", "gelu", "lerp",
)
def pointwise(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Combine tensors element by element."""
    return flow.broadcast([flow.dims(item) for item in node.all_input_nodes])


@rule(
    "to", "_to_copy", "clone", "contiguous", "detach", "alias", "dropout", "feature_dropout",
    "alpha_dropout", "lift_fresh_copy", "lift_fresh", "float", "bucketize", "zeros_like",
    "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "native_dropout",
    "_assert_tensor_metadata", "normal", "uniform", "zero", "exponential", "conj", "resolve_conj",
    "requires_grad",
)
def same(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Keep the shape of the first tensor."""
    dims = flow.dims(node.all_input_nodes[0])
    value = node.meta.get("val")
    return dims if isinstance(value, torch.Tensor) else [dims] * len(tensors_of(value))


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
        moved = dict(zip(dimensions(a["destination"], rank), dimensions(a["source"], rank), strict=True))
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


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
      "reshape_as", "_reshape_alias")
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
        flow.new_dim(size) if term == ONE else term for term, size in zip(padded, shape, strict=True)
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
        flow.site(node, "start", *((Sum((middle, *after)), None, -1) if start < 0 else (Sum(before),)))
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
    chosen = [flow.new_dim(s, f"is indexed by {place}") for s in value_of(node).shape[at : at + count]]
    return (*rest[:at], *chosen, *rest[at:])


@rule("index_select")
def index_select(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Gather along one dimension."""
    dims = flow.dims(a["self"])
    dim = a["dim"] % len(dims)
    place = f"is looked up by index in {flow.where(node)}"
    flow.pin(dims[dim], place)
    return (*dims[:dim], flow.new_dim(value_of(node).shape[dim], place), *dims[dim + 1 :])


@rule(
    "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "var", "std",
    "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm", "any", "all", "median",
    "count_nonzero", "nansum",
)
def reduce(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Reduce over dimensions."""
    tensors = [item for item in node.all_input_nodes if flow.dims(item)]
    if len(tensors) > 1:
        return pointwise(flow, node, a)
    dims = flow.dims(node.all_input_nodes[0])
    gone = dimensions(a.get("dim"), len(dims)) if dims else []
    flow.pin((dims[i] for i in gone), f"is reduced over by {flow.where(node)}")
    keep = bool(a.get("keepdim"))
    rest = tuple(
        ONE if i in gone else term for i, term in enumerate(dims) if keep or i not in gone
    )
    value = node.meta["val"]
    return rest if isinstance(value, torch.Tensor) else [rest] * len(value)


@rule(
    "softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod",
    "logcumsumexp", "cummax", "cummin", "sort", "argsort", "flip", "roll", "tril", "triu", "rot90",
)
def mix(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Combine the elements along dimensions, keeping the shape."""
    dims = flow.dims(a["self"])
    where = a.get("dim", a.get("dims", [-2, -1]))
    flow.pin((dims[i] for i in dimensions(where, len(dims))), f"is mixed by {flow.where(node)}")
    value = node.meta["val"]
    return dims if isinstance(value, torch.Tensor) else [dims] * len(value)


@rule(
    *(f"{kind}{rank}d" for rank in (1, 2, 3) for kind in (
        "avg_pool", "max_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool",
        "upsample_nearest", "_upsample_nearest_exact", "reflection_pad", "replication_pad",
    )),
    "max_pool2d_with_indices", "max_pool3d_with_indices", "upsample_bilinear2d", "upsample_linear1d",
    "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "pad",
    "constant_pad_nd", "topk", "kthvalue",
)
def resample(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Change the size of some dimensions (pooling, padding, choosing), keeping the others."""
    source = node.all_input_nodes[0]
    dims, shape = flow.dims(source), value_of(source).shape
    name = operator_name(node)
    if name in ("topk", "kthvalue"):
        moved = {a["dim"] % len(dims)}
    elif "pad" in a:
        moved = {len(dims) - 1 - i // 2 for i, amount in enumerate(a["pad"]) if amount != 0}
    else:
        rank = next(int(letter) for letter in name if letter.isdigit())
        moved = set(range(len(dims) - rank, len(dims)))
    place = f"is resized by {flow.where(node)}"
    flow.pin((dims[i] for i in moved), place)
    outputs = [
        tuple(
            flow.new_dim(size, place) if i in moved else dims[i]
            for i, size in enumerate(value.shape)
        )
        for value in tensors_of(node.meta["val"])
    ] if name != "kthvalue" else flow.new(node, place)
    assert len(shape) == len(dims)
    return outputs[0] if isinstance(node.meta["val"], torch.Tensor) else outputs


@rule("zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full",
      "new_empty")
def fill(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Create a tensor whose elements are all alike, so that any size will do."""
    result = flow.new(node)
    assert isinstance(result, tuple)
    flow.sizes(node, "size", a["size"], result)
    return result


@rule("arange", "linspace", "eye", "scalar_tensor", "tensor", "tril_indices", "triu_indices")
def constant(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Create a tensor whose elements depend on their position."""
    return flow.new(
        node, f"meets a tensor that is not a parameter, made by {flow.where(node)}"
    )


@rule("one_hot")
def one_hot(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Add a dimension of classes."""
    size = value_of(node).shape[-1]
    return (*flow.dims(a["self"]), flow.new_dim(size, f"is made by {flow.where(node)}"))


@rule("view_as_complex", "view_as_real")
def complex_view(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Trade a last dimension of size 2 for complex numbers."""
    dims, place = flow.dims(a["self"]), f"holds complex numbers in {flow.where(node)}"
    if operator_name(node) == "view_as_complex":
        flow.pin(dims[-1], place)
        return dims[:-1]
    return (*dims, flow.new_dim(2, place))
