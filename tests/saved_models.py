"""Models that the tests of checkpoints save."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphopt.api import optimize
from graphopt.runtime import installation_of


def layers() -> nn.Sequential:
    """Return a model that its description alone can build."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(16, 64), nn.ReLU()),
        nn.Linear(64, 64),
        nn.GELU(approximate="tanh"),
        nn.Dropout(0.25),
        nn.LayerNorm(64, eps=1e-3),
        nn.Linear(64, 4),
    )


def pruned(model: nn.Module, example: Any = None) -> nn.Module:
    """Return a model with pruned channels, in evaluation mode."""
    result = optimize(model, example, recipe=["prune-channels"], budget=0.6, measure=False)
    installation = installation_of(result)
    assert installation is not None
    assert installation.plan.changes
    return result.eval()
