"""Tokens that must not be skipped: positions that outputs read, ids that a configuration names."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .axis_flow import arguments_of, operator_name, tensors_of
from .program import Program, compile_values, shape_of
from .token_blocks import BlockChain, token_dims
from .token_lookups import lookups

_ID_NAMES = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")


def read_positions(blocks: BlockChain) -> tuple[int, ...]:
    """Return the positions of the stream that something behind it picks, negative from the end.

    [CLS] at 0, or the last token: by dataflow, a selection along the dimension of tokens.
    """
    tokens = blocks.tokens
    found: set[int] = set()
    pending = [blocks.blocks[-1].exit]
    seen = set(pending)
    while pending:
        for user in pending.pop().users:
            if user in seen or not tensors_of(user.meta.get("val")):
                continue
            seen.add(user)
            if user.op == "call_function" and operator_name(user) == "select":
                arguments = arguments_of(user)
                source = arguments["self"]
                if arguments["dim"] % len(shape_of(source)) in token_dims(tokens, source):
                    if isinstance(arguments["index"], int):
                        found.add(arguments["index"])
                    continue
            if isinstance(user.meta["val"], torch.Tensor) and token_dims(tokens, user):
                pending.append(user)
    return tuple(sorted(found))


def special_ids(program: Program, blocks: BlockChain) -> tuple[str | None, tuple[int, ...]]:
    """Return the input with the token ids of an encoder, and its special ids.

    Ids are those that the model's configuration calls cls, sep, bos or eos, but for the padding's.
    A causal stream has none: a token there is read by what comes after it, wherever it stands.
    """
    config = getattr(program.model, "config", None)
    named = {getattr(config, name, None) for name in _ID_NAMES}
    ids = {value for value in named if type(value) is int}
    ids -= {getattr(config, "pad_token_id", None)}
    source = _looked_up(program, blocks, getattr(config, "vocab_size", None)) if ids else None
    if source is None or is_causal(program, blocks):
        return None, ()
    return source.name, tuple(sorted(ids))


def is_causal(program: Program, blocks: BlockChain) -> bool:
    """Say whether the first attention of a stream looks back only, on the example.

    Where there are no values (meta tensors), only an attention that says so counts.
    """
    nodes = [node for region in blocks.blocks[0].regions for node in region.nodes]
    for node in nodes:
        if node.op != "call_function":
            continue
        name = operator_name(node)
        if name == "scaled_dot_product_attention":
            arguments = arguments_of(node)
            if arguments["is_causal"] or arguments["attn_mask"] is None:
                return bool(arguments["is_causal"])
            return _hides_the_future(program, arguments["attn_mask"])
        if name in ("softmax", "_softmax") and len(token_dims(blocks.tokens, node)) == 2:
            return _hides_the_future(program, node)
    return False


def _hides_the_future(program: Program, node: fx.Node) -> bool:
    """Say whether all values above the diagonal are the smallest there are."""
    if any(parameter.is_meta for parameter in program.model.parameters()):
        return False
    with torch.no_grad():
        (value,) = compile_values(program, [node])(program.model, *program.few_rows())
    if value.shape[-2] < 2 or value.shape[-2] != value.shape[-1]:
        return False
    seen = value if value.dtype == torch.bool else value > value.double().amin() / 2 + 1e-30
    if value.dtype != torch.bool and value.amin() == 0:
        seen = value > 0
    above = torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).triu(1)
    return not bool(seen[..., above].any())


def _looked_up(program: Program, blocks: BlockChain, rows: Any) -> fx.Node | None:
    """Return the integer input [batch, token] that is looked up in a table of that many rows."""
    inputs = {n.name: n for n in program.placeholders}
    for name, dims in blocks.tokens.inputs.items():
        node = inputs[name]
        counts = dims == (1,) and not node.meta["val"].is_floating_point()
        if counts and rows in (lookup.rows for lookup in lookups(program, node)):
            return node
    return None
