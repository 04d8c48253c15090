"""Where token ids are looked up in a table: from an input of integers, by dataflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from .axis_flow import operator_name, tensor_nodes
from .program import Program, shape_of

_PATH = ("view", "reshape", "to", "_to_copy", "contiguous", "clone", "alias", "clamp")


@dataclass(frozen=True)
class Lookup:
    """One lookup of an input's integers in a table.

    Attributes:
        node: The node that returns rows of the table.
        table: Name of the table: a module, or a parameter without one of its own.
        rows: Rows of the table.
    """

    node: fx.Node
    table: str
    rows: int


def lookups(program: Program, source: fx.Node) -> Iterator[Lookup]:
    """Yield the lookups of an input, as it is or in another shape or type."""
    pending, seen = [source], {source}
    while pending:
        for user in pending.pop().users:
            if user.op == "call_module":
                module = program.module(str(user.target))
                if isinstance(module, nn.Embedding):
                    yield Lookup(user, str(user.target), module.num_embeddings)
            elif user.op != "call_function":
                continue
            elif operator_name(user) == "embedding":
                weight = tensor_nodes(user)[0]
                yield Lookup(user, str(weight.target), shape_of(weight)[0])
            elif user not in seen and operator_name(user) in _PATH:
                seen.add(user)
                pending.append(user)
