"""Which modules compute a model's results: they stay as they are unless asked for."""

from __future__ import annotations

import torch
from torch import fx

from .program import Program
from .structure import outside_objects


def output_heads(program: Program) -> frozenset[str]:
    """Return the modules whose output becomes a result without meeting another tensor.

    A tensor held by a plain object (a key/value cache) is state, not a result.
    """
    results = program.result.args[0]
    assert isinstance(results, (tuple, list))
    outside = outside_objects(program.outputs)
    waiting = [node for node, counts in zip(results, outside, strict=True) if counts]
    heads: set[str] = set()
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if node.op == "call_module":
            heads.add(str(node.target))
        if len(tensors) == 1 and not _has_parameters(program, node):
            waiting.extend(tensors)
    return frozenset(heads)


def _has_parameters(program: Program, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return next(program.module(str(node.target)).parameters(), None) is not None
