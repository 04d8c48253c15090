"""The two changes of `gate-layers`: their details in a plan, and what they do to the graph."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import fx

from graphopt.passes.base import Change
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import PlanError
from graphopt.passes.facts import attribute_of, facts_of
from graphopt.passes.lazy_branches import only_for
from graphopt.passes.program import Program
from graphopt.passes.tokens import Region

from .residual_blocks import BlockPlace


class Skip(Details):
    """A region that a gate leaves out in some training steps.

    Attributes:
        kind: Tells it from a removal.
        place: Which region.
        gate: Name of the gate to add to the model.
        number: Number of the gate, which its draws depend on.
        rate: Largest probability to leave the region out.
        plateau: Progress up to which it stays.
        seed: Seed of the draws.
    """

    kind: Literal["skip"]
    place: BlockPlace
    gate: str
    number: int = Field(ge=0)
    rate: float = Field(gt=0, lt=1)
    plateau: float = Field(ge=0, le=1)
    seed: int


class Freed(Details):
    """A parameter that goes with its region."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool


class Removal(Details):
    """A region that is gone.

    Attributes:
        kind: Tells it from a gate.
        place: Which region.
        freed: The parameters that nothing else reads.
    """

    kind: Literal["remove"]
    place: BlockPlace
    freed: tuple[Freed, ...] = Field(min_length=1)


def read_change(change: Change) -> Skip | Removal:
    """Return the checked details of a change.

    Raises:
        PlanError: if they are not valid.
    """
    if change.details.get("kind") == "remove":
        return read_details(Removal, change)
    return read_details(Skip, change)


def remove_block(program: Program, region: Region, details: Removal, change: Change) -> None:
    """Let a region's entry take the place of its result, and drop the parameters it alone reads.

    Raises:
        PlanError: if they are not those that the plan frees.
    """
    if freed_parameters(program, region) != details.freed:
        raise PlanError(
            f"the parameters of the block at {change.target!r} are not those that the plan frees; "
            "is this plan for another model?"
        )
    dead = only_for(region.add, region.entry)
    region.add.replace_all_uses_with(region.entry)
    program.graph.erase_node(region.add)
    for node in reversed(dead):
        program.graph.erase_node(node)
    for freed in details.freed:
        owner, _, attribute = freed.name.rpartition(".")
        program.module(owner)._parameters[attribute] = None


def freed_parameters(program: Program, region: Region) -> tuple[Freed, ...]:
    """Return the parameters that only the region reads."""
    dead = {*only_for(region.add, region.entry)}
    facts = facts_of(program)

    def read(nodes: set[fx.Node]) -> set[str]:
        return {name for node in nodes for name in facts.nodes[node].weights}

    kept = read({node for node in facts.nodes if node not in dead})
    found = []
    for name in sorted(read(dead) - kept):
        parameter = attribute_of(program, name)
        found.append(
            Freed(
                name=name,
                shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                trained=parameter.requires_grad,
            )
        )
    return tuple(found)
