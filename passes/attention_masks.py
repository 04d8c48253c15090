"""Which attentions mask nothing but padding, and later tokens.

The mask's dataflow may only hold what such masks are made of: the padding input, token numbers and
comparisons of these, no number that could be the width of a window and no parameter. What it hides
is then the same at every size, so its values at one size tell which of the two kinds it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from .axis_flow import arguments_of, operator_name, tensor_nodes
from .program import Program, compile_values, shape_of

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_VIEWS = frozenset({"expand", "view", "reshape"})
"""Operators that may name any size."""
_COMPARED = frozenset({"le", "ge", "gt", "lt", "eq", "ne", "add"})
"""Operators whose numbers must be 0; `masked_fill` and `where` may also hide by any number."""
_PARTS = frozenset(
    {
        *_VIEWS,
        *_COMPARED,
        *("to", "_to_copy", "contiguous", "clone", "unsqueeze", "transpose", "slice", "index"),
        *("arange", "new_ones", "ones", "zeros", "zeros_like", "full", "scalar_tensor"),
        *("__and__", "bitwise_and", "logical_and", "logical_not", "bitwise_not"),
        *("masked_fill", "where"),
    }
)
_HIDDEN = -1e4


def padding_attentions(program: Program, name: str) -> dict[fx.Node, bool]:
    """Return the attentions that hide padding, or padding and later tokens, and nothing else.

    Args:
        program: The program.
        name: The padding input [batch, token].

    Returns:
        Their nodes, and whether they hide later tokens too.
    """
    found: dict[fx.Node, bool] = {}
    kinds: dict[fx.Node, bool | None] = {}
    (tokens,) = (shape_of(node)[1] for node in program.placeholders if node.name == name)
    for node in program.graph.nodes:
        if node.target is not _ATTENTION:
            continue
        arguments = arguments_of(node)
        mask = arguments["attn_mask"]
        if not isinstance(mask, fx.Node) or arguments["is_causal"]:
            continue
        if {shape_of(arguments[item])[-2] for item in ("query", "key")} != {tokens}:
            continue
        if mask not in kinds:
            kinds[mask] = _kind(program, name, mask) if _is_plain(mask, name) else None
        kind = kinds[mask]
        if kind is not None:
            found[node] = kind
    return found


def _is_plain(mask: fx.Node, name: str) -> bool:
    """Say whether a mask is made of nothing but the parts of padding and causal masks."""
    pending, seen = [mask], {mask}
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            if node.name != name:
                return False
            continue
        if node.op != "call_function":
            return False
        if node.target is getattr or node.target is torch.ops.aten.sym_size.int:
            continue  # a device or a size
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        kind = operator_name(node).rstrip("_") or operator_name(node)
        kind = kind if kind in _PARTS else operator_name(node)
        if kind not in _PARTS or (kind in _COMPARED and any(_numbers(node))):
            return False
        for source in tensor_nodes(node) if kind in _VIEWS else node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return True


def _numbers(node: fx.Node) -> Iterator[Any]:
    return (
        item
        for item in (*node.args, *node.kwargs.values())
        if isinstance(item, (int, float)) and not isinstance(item, bool)
    )


def _kind(program: Program, name: str, mask: fx.Node) -> bool | None:
    """Return whether a mask hides later tokens besides padding, None if it hides other things."""
    inputs: list[Tensor] = []
    real = torch.ones(1, 1, dtype=torch.bool)
    for node in program.placeholders:
        value = torch.zeros(shape_of(node), dtype=node.meta["val"].dtype)
        if node.name == name:
            numbers = torch.arange(value.numel()).view(value.shape)
            real = (numbers % 3 != 1) & (numbers % 5 != 3)
            value = real.to(value.dtype)
        inputs.append(value)
    run = compile_values(program, [mask])
    for marked in (real, ~real):
        with torch.no_grad():
            (hidden,) = run(program.model, *inputs)
        kind = _compared(hidden, marked)
        if kind is not None:
            return kind
    return None


def _compared(mask: Tensor, real: Tensor) -> bool | None:
    """Return the kind of a mask's values where these tokens are real."""
    batch, tokens = real.shape
    if mask.dim() != 4 or tokens < 3:
        return None
    if mask.dtype == torch.bool:
        shown = mask
    else:
        shown = mask == 0
        if not bool((shown | (mask <= _HIDDEN)).all()):
            return None
    try:
        shown = shown.expand(batch, mask.shape[1], tokens, tokens)
    except RuntimeError:
        return None
    queries = real[:, None, :, None]
    keys = real[:, None, None, :]
    order = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if torch.equal(shown & queries, (keys & queries).expand_as(shown)):
        return False
    if torch.equal(shown & queries, (keys & queries & order).expand_as(shown)):
        return True
    return None
