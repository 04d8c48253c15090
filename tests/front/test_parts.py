"""A model that cannot be captured is optimized in its largest parts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.passes.verifier import rounding_bound
from graphopt.runtime import installation_of


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + change


class Branching(nn.Module):
    """Reads a value to choose a path: no graph can hold that."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Residual()
        self.second = Residual()
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.sum().item() > 0:
            x = self.second(x)
        result: torch.Tensor = self.head(x)
        return result


def test_parts_are_pruned_and_the_model_still_chooses(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = Branching().eval()
    example = torch.ones(8, 16)
    with pytest.raises(graphopt.errors.CaptureError, match="data-dependent"):
        graphopt.capture(copy.deepcopy(model), example)
    small = graphopt.optimize(model, example, recipe=["prune-channels"], budget=0.6, measure=False)
    assert capfd.readouterr().err == "", "the exporter's own output is not the user's"
    installation = installation_of(small)
    assert installation is not None
    assert set(installation.plan.parts) == {"first", "second", "head"}
    assert "only parts" in installation.plan.notes[0]
    for name in ("first", "second"):
        part = small.get_submodule(name)
        assert part.get_submodule("up").out_features < 64  # type: ignore[operator]
        program = installation_of(part)
        assert program is not None
        assert program.program is not None
        bound = rounding_bound(program.program)
        reference = copy.deepcopy(part).double()
        x = torch.randn(5, 16)
        error = (part(x).double() - reference(x.double())).norm() / reference(x.double()).norm()
        assert error.item() <= bound
    positive, negative = example, -100 * example
    assert not torch.equal(small(positive), small(negative))
    totals = installation.plan.totals
    assert totals is not None
    assert totals.after.flops < totals.before.flops


def test_calibration_reaches_the_parts() -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    batches = [{"x": torch.randn(64, 16) + 1} for _ in range(4)]
    small = graphopt.optimize(
        model,
        torch.ones(8, 16),
        recipe=["prune-channels"],
        budget=0.6,
        measure=False,
        calibration=batches,
    )
    installation = installation_of(small)
    assert installation is not None
    changes = installation.plan.parts["first"].changes
    assert changes
    assert all(change.predicted_error is not None for change in changes)
