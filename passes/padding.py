"""Which input says which tokens are padding, found by dataflow."""

from __future__ import annotations

import torch
from torch import fx

from .program import Program

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_MASK_POSITION = 3
_SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)
_LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten.gather.default)


def padding_input(program: Program) -> str | None:
    """Return the name of the [batch, token] input that masks attention, None if there is none.

    It is the integer or boolean input of two dimensions whose values, not passing through an
    embedding, reach the mask of an attention or the scores before a softmax.
    """
    for node in program.placeholders:
        value = node.meta["val"]
        if value.dim() == 2 and not value.is_floating_point() and _reaches_mask(node):
            return node.name
    return None


def _reaches_mask(source: fx.Node) -> bool:
    pending, seen = [source], {source}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.target is _ATTENTION:
                if len(user.args) > _MASK_POSITION and user.args[_MASK_POSITION] is node:
                    return True
                if user.kwargs.get("attn_mask") is node:
                    return True
                continue
            if user.target in _SOFTMAX:
                return True
            passes = user.op == "call_function" and user.target not in _LOOKUPS
            if passes and user not in seen and isinstance(user.meta.get("val"), torch.Tensor):
                seen.add(user)
                pending.append(user)
    return False
