"""A small residual model, and what a pass over layers makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt.capture import capture
from graphopt.passes.base import Context
from graphopt.passes.gates.gate_layers import GateLayers
from graphopt.passes.manager import PassManager
from graphopt.passes.program import Program

TRAINING = Context(training=True)


class Block(nn.Module):
    """A pre-norm block of two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return result


class Stack(nn.Module):
    """Some blocks and a head."""

    def __init__(self, blocks: int = 4, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x)
        return result


def blocks_of(model: nn.Module) -> list[Block]:
    """Return the blocks of a stack."""
    return [module for module in model.modules() if isinstance(module, Block)]


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def changed(
    model: nn.Module, example: Any, step: GateLayers, context: Context = TRAINING
) -> tuple[Program, Any]:
    """Return the program with the changes of a pass, and their plan."""
    program = capture(model, example)
    return program, PassManager(passes=(step,), context=context).run(program)


def reasons(model: nn.Module, example: Any, step: GateLayers, context: Context) -> list[str]:
    """Return why a pass leaves blocks as they are."""
    proposal = step.propose(capture(model, example), context)
    return [miss.reason for miss in proposal.misses]
