"""`ramp-resolution` acts where the outputs do not depend on the size of an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture import capture
from graphopt.passes.base import Context
from graphopt.passes.errors import ConfigError
from graphopt.passes.gates.ramp_resolution import RampResolution
from graphopt.training import ComputeClock, ExecutedFlops

IMAGES = torch.randn(4, 3, 32, 32)


def net(*head: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *head)


def pooled() -> nn.Sequential:
    return net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def reason(model: nn.Module, images: torch.Tensor = IMAGES) -> str:
    proposal = RampResolution().propose(capture(model, images), Context())
    assert not proposal.candidates
    return proposal.misses[0].reason


def test_a_training_begins_on_small_images_and_ends_on_full_ones() -> None:
    model = graphopt.optimize(pooled(), IMAGES, recipe="ramp-resolution")
    model.train()
    clock = ComputeClock(model, planned_steps=10)
    spent = []
    for _ in range(10):
        with ExecutedFlops() as executed:
            model(IMAGES).sum().backward()
        spent.append(executed.flops)
        clock.step()
    full = spent[-1]
    # The convolution dominates; its operations follow the area: a quarter at half the sides.
    assert spent[0] / full == pytest.approx(0.25, abs=0.01)
    assert spent == sorted(spent)


def test_evaluation_is_that_of_the_plain_model() -> None:
    dense = pooled().eval()
    model = graphopt.optimize(dense, IMAGES, recipe="ramp-resolution")
    ComputeClock(model, planned_steps=10)
    assert torch.equal(model.eval()(IMAGES), dense(IMAGES))


def test_batch_statistics_are_left_alone() -> None:
    model = pooled().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    RampResolution().propose(capture(model, IMAGES), Context())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_that_reads_every_position_is_refused() -> None:
    assert "fails on smaller images" in reason(net(nn.Flatten(), nn.Linear(8 * 32 * 32, 2)))


def test_an_output_for_every_position_is_refused() -> None:
    assert "smaller images" in reason(net(nn.Conv2d(8, 2, 1)))


def test_without_an_image_to_shrink_nothing_is_proposed() -> None:
    assert "no input" in reason(nn.Linear(4, 4), torch.randn(2, 4))
    assert "too small" in reason(pooled(), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("options", [{"start": 0.0}, {"hold": 0.9}, {"multiple": 0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="ramp-resolution takes"):
        RampResolution(**options)
