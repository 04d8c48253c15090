"""How much of a model lies below each of its blocks: what freezing to a depth means."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import fx

from .facts import attribute_of, facts_of
from .module_blocks import block_names
from .program import Program
from .tokens import Region, residual_stream


@dataclass(frozen=True)
class FrozenDepth:
    """A place on the residual stream, and what is computed before it.

    Attributes:
        depth: Number of blocks before it; 0 is the stream's beginning, where nothing is frozen.
        parameters: Names of the parameters that its value depends on, by their first names; a
            tied one (embeddings and output head) is among them.
        nodes: What is computed before it, and it.
        flops: Operations of one forward up to it, at the example's sizes.
    """

    depth: int
    parameters: tuple[str, ...]
    nodes: frozenset[fx.Node]
    flops: int


def frozen_depths(program: Program) -> tuple[FrozenDepth, ...]:
    """Return all depths of a program, 0 first; only that if it has no residual stream.

    The stream is the chain of residual adds that does the most work. Its regions that come from
    one block of the module tree (attention and feed-forward of a layer) are one step; elsewhere
    every region is a step.
    """
    depths = [FrozenDepth(0, (), frozenset(), 0)]
    facts = facts_of(program)
    named = [*program.model.named_parameters()]
    for depth, end in enumerate(_ends(program), 1):
        before = _ancestors(end)
        # By identity, as a tied parameter is read under other names too.
        read = {
            id(attribute_of(program, weight))
            for node in before
            for weight in facts.nodes[node].weights
        }
        parameters = tuple(name for name, parameter in named if id(parameter) in read)
        flops = sum(facts.nodes[node].forward_flops for node in before)
        depths.append(FrozenDepth(depth, parameters, frozenset(before), flops))
    return tuple(depths)


def _ends(program: Program) -> list[fx.Node]:
    """Return the value of the stream after each block."""
    facts = facts_of(program)
    chains = residual_stream(program).chains
    if not chains:
        return []
    chain = max(
        chains, key=lambda item: sum(facts.cost(region.nodes).flops for region in item.regions)
    )
    blocks = frozenset(block_names(program.model))
    steps: dict[object, fx.Node] = {}
    for number, region in enumerate(chain.regions):
        block = _block(region, blocks)
        end = region.after[-1] if region.after else region.add
        steps[block or number] = _within(end, block)
    return list(steps.values())


def _block(region: Region, blocks: Set[str]) -> str | None:
    """Return the call of a block that a region belongs to: "layer.0", "block@1"."""
    calls = region.add.meta["calls"]
    return next((call for call in calls if call.partition("@")[0] in blocks), None)


def _within(end: fx.Node, block: str | None) -> fx.Node:
    """Follow the stream to the end of its block: after the last region no next one says where."""
    while len(end.users) == 1:
        (user,) = end.users
        if block is None or block not in user.meta.get("calls", ()):
            break
        end = user
    return end


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, pending = {node}, [node]
    while pending:
        for item in pending.pop().all_input_nodes:
            if item not in found:
                found.add(item)
                pending.append(item)
    return found
