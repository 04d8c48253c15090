"""Residual blocks as what a pass rewrites: named in plans by the parameters they read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from pydantic import Field
from torch import fx

from graphopt.kernels.gates import Gate
from graphopt.passes.base import Change, Context
from graphopt.passes.details import Details
from graphopt.passes.errors import PlanError
from graphopt.passes.facts import attribute_of, facts_of
from graphopt.passes.lazy_branches import only_for
from graphopt.passes.program import Program, shape_of
from graphopt.passes.tokens import Region, residual_stream

BLOCK_ORDER = "numbers of the residual blocks"
"""What changes claim that count blocks (exclusively), or that take blocks away (shared)."""


class BlockPlace(Details):
    """Which region a change is about.

    Attributes:
        weights: Names of the parameters that its operations read.
        occurrence: Which of the regions that read these, in graph order (shared blocks).
    """

    weights: tuple[str, ...] = Field(min_length=1)
    occurrence: int = Field(ge=0)


@dataclass(frozen=True)
class ResidualBlock:
    """A region with its place, its depth in the model (1 for the last) and a name for people."""

    region: Region
    place: BlockPlace
    depth: float
    first: bool
    width_dim: int
    name: str


def residual_blocks(program: Program) -> Iterator[ResidualBlock]:
    """Yield the regions that have parameters, in graph order."""
    seen: dict[tuple[str, ...], int] = {}
    chains = residual_stream(program).chains
    found = [(region, chain.width_dim) for chain in chains for region in chain.regions]
    for index, (region, width_dim) in enumerate(found):
        weights = _weights(program, region)
        if not weights:
            continue
        occurrence = seen.get(weights, 0)
        seen[weights] = occurrence + 1
        yield ResidualBlock(
            region=region,
            place=BlockPlace(weights=weights, occurrence=occurrence),
            depth=(index + 1) / len(found),
            first=index == 0,
            width_dim=width_dim,
            name=_name(program, weights) + (f"@{occurrence}" if occurrence else ""),
        )


def _weights(program: Program, region: Region) -> tuple[str, ...]:
    facts = facts_of(program)
    return tuple(sorted(frozenset().union(*(facts.nodes[node].weights for node in region.nodes))))


def _name(program: Program, weights: Sequence[str]) -> str:
    """Return the innermost module that holds the matrices, or else all parameters."""
    matrices = [name for name in weights if attribute_of(program, name).dim() > 1]
    paths = [name.split(".")[:-1] for name in matrices or weights]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in common) or "(model)"


def find_blocks(
    program: Program, places: Sequence[BlockPlace], change: Change
) -> tuple[Region, ...]:
    """Return the regions of places.

    Raises:
        PlanError: if the program has none at one of them.
    """
    regions = {found.place: found.region for found in residual_blocks(program)}
    missing = [place for place in places if place not in regions]
    if missing:
        raise PlanError(
            f"the model has no residual block with {missing[0].weights[0]!r} like the one at "
            f"{change.target!r}, which the plan describes; is this plan for another model?"
        )
    return tuple(regions[place] for place in places)


def escaping(region: Region) -> str:
    """Say which values of a region something outside reads."""
    names = ", ".join(node.name for node in region.escapes)
    return (
        f"{names} inside of it is also read outside; take a call without these results (a cache, "
        "attention maps) as the example"
    )


def refusal(program: Program, context: Context, block: ResidualBlock) -> str | None:
    """Say why a block must run as it is, None if what it starts from may take its place."""
    pattern = context.ignored_by(block.name, *block.place.weights)
    if pattern is not None:
        return f"ignored by the pattern {pattern!r}"
    region = block.region
    if any(_is_gate(program, user) for user in region.add.users):
        return "it is gated already"
    entry, result = region.entry.meta["val"], region.add.meta["val"]
    if shape_of(region.entry) != shape_of(region.add) or entry.dtype != result.dtype:
        return (
            f"it starts from {list(entry.shape)} {entry.dtype} and ends with "
            f"{list(result.shape)} {result.dtype}"
        )
    written = _written_outside(region)
    if written is not None:
        return f"it writes in place to {written.name}, which is outside"
    return None


def kept_by_readers(program: Program, block: ResidualBlock) -> str | None:
    """Say why leaving a block out in training saves little, None if it saves half of it at least.

    What something outside of it reads is computed in any case.
    """
    region, facts = block.region, facts_of(program)
    all_flops = facts.cost(region.nodes).flops
    saved = facts.cost(only_for(region.add, region.entry)).flops
    if 2 * saved < all_flops:
        return f"{escaping(region)}; that leaves {saved / all_flops:.0%} of it to save"
    return None


def _is_gate(program: Program, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(program.module(str(node.target)), Gate)


def _written_outside(region: Region) -> fx.Node | None:
    """Return a value outside of a region that it writes to, directly or through a view."""
    inside = set(region.nodes)
    for node in (*region.nodes, region.add):
        source: Any = node
        while isinstance(source.target, torch._ops.OpOverload) and source.all_input_nodes:
            schema = source.target._schema
            if not (schema.is_mutable if source is node else _is_view(schema)):
                break
            source = source.all_input_nodes[0]
            if source not in inside:
                return source  # type: ignore[no-any-return]
    return None


def _is_view(schema: Any) -> bool:
    return any(item.alias_info is not None for item in schema.returns)
