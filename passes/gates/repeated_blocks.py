"""Residual blocks that a model repeats: which is a block of the same kind, some blocks further."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphopt.passes.facts import attribute_of, facts_of
from graphopt.passes.program import Program

from .residual_blocks import ResidualBlock, residual_blocks


def repeated_layers(program: Program) -> tuple[tuple[ResidualBlock, ...], ...]:
    """Return the longest run of layers that have the same operations and shapes.

    A layer is the shortest sequence of blocks that repeats (attention and feed-forward, say), in
    graph order. Without repetition there are none.
    """
    blocks = list(residual_blocks(program))
    kinds = [_kind(program, block) for block in blocks]
    best = (0, 0, 0)
    for period in range(1, len(blocks) // 2 + 1):
        for start in range(len(blocks) - 2 * period + 1):
            layers = _layers(kinds, start, period)
            if layers > 1 and layers * period > best[2] * best[1]:
                best = (start, period, layers)
    start, period, layers = best
    firsts = range(start, start + period * layers, period or 1)
    return tuple(tuple(blocks[at : at + period]) for at in firsts)


def ordered_weights(program: Program, block: ResidualBlock) -> tuple[str, ...]:
    """Return the names of a block's parameters in the order in which they are read."""
    nodes = facts_of(program).nodes
    read = (name for node in block.region.nodes for name in sorted(nodes[node].weights))
    return tuple(dict.fromkeys(read))


def _layers(kinds: Sequence[object], start: int, period: int) -> int:
    """Return how often the blocks from a place on repeat, the first time included."""
    end = start + period
    while end < len(kinds) and kinds[end] == kinds[end - period]:
        end += 1
    return (end - start) // period


def _kind(program: Program, block: ResidualBlock) -> object:
    """Return what blocks of the same kind have in common: operations and parameters' shapes."""
    weights = [attribute_of(program, name) for name in ordered_weights(program, block)]
    return (
        tuple(_operation(node) for node in block.region.nodes),
        tuple((tuple(weight.shape), weight.dtype) for weight in weights),
    )


def _operation(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else node.op
