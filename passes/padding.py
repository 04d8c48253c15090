"""Which input says which tokens are padding, found by dataflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .program import Program, compile_values

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_MASK_POSITION = 3
_SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)
_LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten.gather.default)


def padding_input(program: Program) -> str | None:
    """Return the name of the [batch, token] input that masks attention, None if there is none.

    It is the input that the program was told (`program.padding`), or the integer or boolean input
    of two dimensions whose values, not passing through an embedding, reach the mask of an attention
    or the scores before a softmax.
    """
    if program.padding is not None:
        return program.padding
    found = _mask_place(program)
    return found[0].name if found else None


def real_tokens(program: Program, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Return which tokens of a batch are not padding [batch, token], None if nothing says so.

    Some models mark the real tokens, some (`key_padding_mask`) the padding: which, is read off the
    values that reach the attention.
    """
    name = padding_input(program)
    mask = batch.get(name) if name else None
    if not isinstance(mask, torch.Tensor):
        return None
    return mask.bool() if marks_real(program) else ~mask.bool()


def marks_real(program: Program) -> bool:
    """Say whether the padding input is non-zero at real tokens, else at padding.

    A mask that does not reach an attention, or that cannot be run on the meta device, is taken to
    mark the real tokens.
    """
    found: bool = program.call_fact("padding input marks real tokens", _marks_real)
    return found


def _marks_real(program: Program) -> bool:
    """Say whether an unmarked token is one that attention sees less of than a marked one."""
    found = _mask_place(program)
    if found is None or found[0].name != padding_input(program):
        return True
    source, place = found
    if any(tensor.is_meta for tensor in program.few_rows()):
        return True
    index = program.placeholders.index(source)
    tensors = program.few_rows()
    token = min(1, tensors[index].shape[1] - 1)
    run = compile_values(program, [place])

    def seen(marked: bool) -> torch.Tensor:
        mask = torch.ones_like(tensors[index])
        mask[:, token] = marked
        with torch.no_grad():
            (value,) = run(program.model, *tensors[:index], mask, *tensors[index + 1 :])
        return torch.as_tensor(value)[..., token].double().nan_to_num()

    # A fully masked row may be let through, so marked padding can also look the same.
    return bool((seen(False) < seen(True)).any())


def _mask_place(program: Program) -> tuple[fx.Node, fx.Node] | None:
    """Return the input that masks attention and the value through which it does."""
    for node in program.placeholders:
        value = node.meta["val"]
        if value.dim() == 2 and not value.is_floating_point():
            place = _masked_by(node)
            if place is not None:
                return node, place
    return None


def _masked_by(source: fx.Node) -> fx.Node | None:
    """Return the mask of an attention, or the scores before a softmax, that an input reaches."""
    pending, seen = [source], {source}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.target is _ATTENTION:
                if len(user.args) > _MASK_POSITION and user.args[_MASK_POSITION] is node:
                    return node
                if user.kwargs.get("attn_mask") is node:
                    return node
                continue
            if user.target in _SOFTMAX:
                return node
            passes = user.op == "call_function" and user.target not in _LOOKUPS
            if passes and user not in seen and isinstance(user.meta.get("val"), torch.Tensor):
                seen.add(user)
                pending.append(user)
    return None
