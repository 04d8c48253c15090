"""The details of gated tokens, and the gates that they describe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from graphopt.kernels.token_routers import (
    AttendedTokens,
    LearnedTokens,
    RandomTokens,
    TokenGate,
)
from graphopt.passes.details import Details

HOLDER = "token_gates"
"""Name of the module that holds a model's gates."""

Router = Literal["random", "attention", "learned"]
Share = Annotated[float, Field(gt=0, le=1)]


class GateDetails(Details):
    """One gate: which blocks it decides for, and what it must know.

    Attributes:
        chain: Which chain of blocks.
        first: Its first gated block.
        last: The last one that the same route leads over.
        keep: The share of tokens.
        fixed: Positions that always run.
        ids: The input with token ids, None without special ones.
        special_ids: Ids that always run.
        padding: The input that marks padding, None where nothing does or nobody asks.
        marks_real: Whether it marks the real tokens.
    """

    chain: int = Field(ge=0)
    first: int = Field(ge=0)
    last: int = Field(ge=0)
    keep: Share
    fixed: tuple[int, ...]
    ids: str | None
    special_ids: tuple[int, ...]
    padding: str | None
    marks_real: bool


class Gating(Details):
    """All gates of a model."""

    router: Router
    seed: int
    full_at: Share
    anneal: float = Field(ge=0, le=1)
    gates: tuple[GateDetails, ...] = Field(min_length=1)


def make_gates(details: Gating, widths: list[int]) -> nn.ModuleDict:
    """Return the gates that the details describe, by number, on the CPU.

    Args:
        details: The details.
        widths: The width of the stream at each gate.
    """
    return nn.ModuleDict(
        {
            str(number): _make_gate(details, gate, number, width)
            for number, (gate, width) in enumerate(zip(details.gates, widths, strict=True))
        }
    )


def _make_gate(details: Gating, gate: GateDetails, number: int, width: int) -> TokenGate:
    options: dict[str, Any] = {
        "keep": gate.keep,
        "seed": details.seed,
        "number": number,
        "fixed": gate.fixed,
        "special_ids": gate.special_ids,
    }
    if details.router == "random":
        return RandomTokens(full_at=details.full_at, **options)
    options |= {"anneal": details.anneal, "marks_real": gate.marks_real}
    if details.router == "attention":
        return AttendedTokens(start=gate.keep, **options)
    return LearnedTokens(width, **options)
