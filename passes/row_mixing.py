"""Which dimensions of its operands an ATen operator mixes: one rule for each kind of operator.

Along all other dimensions an element of the result depends only on elements at the same place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .axis_flow import arguments_of, operator_name, tensor_nodes, value_of
from .axis_shapes import dimensions

Mixed = Mapping[fx.Node, frozenset[int]]
Arguments = Mapping[str, Any]
Rule = Callable[[fx.Node, Arguments], "Mixed | None"]

_RULES: dict[str, Rule] = {}


def mixed_dims(node: fx.Node) -> Mixed | None:
    """Return the dimensions that a `call_function` node mixes, by operand.

    Where the elements of the result lie is not said here (see `axes`): a view mixes nothing.

    Returns:
        Operands that are missing have no mixed dimensions; None for an unknown operator, which
        may mix everything.
    """
    if node.target is operator.getitem:
        return {}
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = operator_name(node)
    rule = _RULES.get(name) or _RULES.get(name.rstrip("_"))
    if rule is not None:
        return rule(node, arguments_of(node))
    return {} if torch.Tag.pointwise in node.target.tags else None


def _rule(*operators: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(operators, function))
        return function

    return register


@_rule(
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("view_as", "reshape_as", "permute", "transpose", "t", "movedim", "swapaxes", "mT"),
    *("expand", "expand_as", "broadcast_to", "alias", "detach", "contiguous", "clone", "to"),
    *("_to_copy", "type_as", "float", "lift_fresh_copy", "dropout", "native_dropout"),
    *("bernoulli", "where", "masked_fill", "rsub", "lerp", "gelu", "hardswish", "log_sigmoid"),
    *("floor_divide", "special_expit", "zeros_like", "ones_like", "full_like", "stack"),
    *("repeat_interleave", "prelu"),
)
def _elementwise(node: fx.Node, a: Arguments) -> Mixed | None:
    """Move or combine elements one by one."""
    return None if "dtype" in a and operator_name(node) == "view" else {}


@_rule(
    *("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod"),
    *("sort", "argsort", "flip", "roll", "glu", "topk"),
    *("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "var", "std"),
    *("var_mean", "logsumexp", "norm", "linalg_vector_norm", "any", "all"),
    *("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unbind", "select"),
)
def _along_dims(node: fx.Node, a: Arguments) -> Mixed | None:
    """Mix along the dimensions of an argument, all of them without it."""
    if "other" in a:  # max(a, b): element by element
        return {}
    source = a["self"]
    rank = value_of(source).dim()
    return {source: frozenset(dimensions(a.get("dim", a.get("dims")), rank))}


@_rule("slice", "narrow")
def _range(node: fx.Node, a: Arguments) -> Mixed | None:
    """Keep a range of a dimension; the whole of it mixes nothing."""
    source = a["self"]
    dim = a["dim"] % value_of(source).dim()
    if str(value_of(source).shape[dim]) == str(value_of(node).shape[dim]):
        return {}
    return {source: frozenset({dim})}


@_rule("cat", "concat", "concatenate")
def _join(node: fx.Node, a: Arguments) -> Mixed | None:
    """Put tensors one after the other along a dimension; nothing after one changes nothing."""
    dim = a["dim"] % value_of(node).dim()
    if len(filled(a["tensors"])) == 1:
        return {}
    return {item: frozenset({dim}) for item in a["tensors"]}


def filled(tensors: Sequence[fx.Node]) -> list[fx.Node]:
    """Return those of some tensors that are not empty at every size."""
    return [item for item in tensors if not any(size == 0 for size in _static(item))]


def _static(node: fx.Node) -> list[int]:
    return [size for size in value_of(node).shape if isinstance(size, int)]


@_rule("constant_pad_nd", "pad")
def _pad(node: fx.Node, a: Arguments) -> Mixed | None:
    """Put values before and after some dimensions."""
    rank = value_of(a["self"]).dim()
    padded = (rank - 1 - i // 2 for i, amount in enumerate(a["pad"]) if amount != 0)
    return {a["self"]: frozenset(padded)}


@_rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _norm(node: fx.Node, a: Arguments) -> Mixed | None:
    """Mix the last dimensions of the input; parameters have all of theirs used everywhere."""
    rank, count = value_of(a["input"]).dim(), len(a["normalized_shape"])
    return {**_whole(node, a["input"]), a["input"]: frozenset(range(rank - count, rank))}


@_rule("embedding")
def _lookup(node: fx.Node, a: Arguments) -> Mixed | None:
    """Take rows of a table."""
    return _whole(node, a["indices"])


@_rule("gather", "take_along_dim")
def _gather(node: fx.Node, a: Arguments) -> Mixed | None:
    """Take elements along a dimension."""
    rank = value_of(a["self"]).dim()
    dims = frozenset(dimensions(a["dim"], rank))
    return dict.fromkeys(tensor_nodes(node), dims)


@_rule("linear")
def _linear(node: fx.Node, a: Arguments) -> Mixed | None:
    """Contract the last dimension of the input with a weight."""
    last = value_of(a["input"]).dim() - 1
    return {**_whole(node, a["input"]), a["input"]: frozenset({last})}


@_rule("quantized_linear")
def _quantized_linear(node: fx.Node, a: Arguments) -> Mixed | None:
    """Contract the last dimension of rows with a weight; one scale for all rows mixes them too."""
    if a["activations"] == "dynamic-tensor":
        return None
    return {**_whole(node, a["x"]), a["x"]: frozenset({1})}


@_rule("mm", "matmul", "bmm", "addmm", "baddbmm")
def _product(node: fx.Node, a: Arguments) -> Mixed | None:
    """Contract the last dimension of one operand with the last but one of the other."""
    names = next(p for p in (("mat1", "mat2"), ("batch1", "batch2"), ("self",)) if p[0] in a)
    left = a[names[0]]
    right = a[names[1]] if len(names) == 2 else a.get("mat2", a.get("other"))
    first, second = value_of(left).dim(), value_of(right).dim()
    if left is right:
        return _whole(node, None)
    return {left: frozenset({first - 1}), right: frozenset({max(second - 2, 0)})}


def _whole(node: fx.Node, kept: fx.Node | None) -> Mixed:
    """Return all dimensions of all operands but one as mixed."""
    return {
        item: frozenset(range(value_of(item).dim()))
        for item in tensor_nodes(node)
        if item is not kept
    }
