"""A small program, a pass for it, and what a plan says was given up."""

from __future__ import annotations

import torch
from torch import nn

from graphopt.capture import capture
from graphopt.passes.compress.prune_channels import PruneChannels
from graphopt.passes.guard import GIVEN_UP
from graphopt.passes.plan import MissRecord, Plan
from graphopt.passes.program import Program

PRUNE = PruneChannels(round_to=1)


def program() -> Program:
    """Return three linear layers with two groups of hidden units."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )
    return capture(model, torch.randn(5, 8))


def given_up(plan: Plan) -> list[MissRecord]:
    """Return what was taken back because of the guard."""
    return [miss for miss in plan.misses if miss.reason.startswith(GIVEN_UP)]
