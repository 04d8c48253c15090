"""`ramp-resolution` acts where the outputs do not depend on the size of an image."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.capture import capture
from graphopt.kernels.resolution_gate import ResolutionGate
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


class Patches(nn.Module):
    """Patches with a class token in front and a table of positions, mixed by attention.

    `order` are the dimensions of patches [image, channel, row, column] that become the tokens.
    """

    def __init__(self, patch: int = 4, order: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 16, patch, stride=patch)
        self.order = order
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 1 + (32 // patch) ** 2, 16))
        self.mix = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(images).permute(0, 1, *self.order).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), tokens], 1)
        logits: torch.Tensor = self.head(self.mix(tokens + self.places)[:, 0])
        return logits


def begun(model: nn.Module, **options: Any) -> nn.Module:
    """Return a model on its smallest images."""
    steps = [RampResolution(**options)]
    model = graphopt.optimize(model.train(), IMAGES, recipe=steps, measure=False)
    ComputeClock(model, planned_steps=10).step(0)
    return model


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


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_patches_of_small_images_have_the_mean_position_of_their_area(
    order: tuple[int, int],
) -> None:
    dense = Patches(order=order).train()
    found = begun(copy.deepcopy(dense))(IMAGES)
    # The same net for images of half the sides: the code that is captured is not used here.
    places = dense.places.detach()
    grid = places[:, 1:].view(1, 4, 2, 4, 2, 16).mean((2, 4)).view(1, 16, 16)
    dense.places = nn.Parameter(torch.cat([places[:, :1], grid], 1))
    wanted = dense(F.avg_pool2d(IMAGES, 2))
    torch.testing.assert_close(found, wanted)


def test_sizes_are_multiples_of_a_patch() -> None:
    # 0.4 * 32 is 12.8: 12 pixels would be one patch of 8 and a half.
    model = begun(Patches(patch=8), start=0.4)
    gate = next(part for part in model.modules() if isinstance(part, ResolutionGate))
    assert gate(IMAGES).shape[2:] == (16, 16)
    assert model(IMAGES).shape == (4, 2)


def test_a_table_that_is_not_added_is_refused() -> None:
    model = Patches()
    mixed = nn.Sequential(
        model.patch, nn.Flatten(2), nn.Linear(64, 8), nn.Flatten(), nn.Linear(16 * 8, 2)
    )
    assert "fails on smaller images" in reason(mixed)


def test_without_the_ramp_the_model_is_as_it_was() -> None:
    dense = Patches()
    names = {name for name, _ in dense.named_modules()}
    model = graphopt.optimize(dense, IMAGES, recipe="ramp-resolution")
    assert {name for name, _ in model.named_modules()} > names
    assert {name for name, _ in graphopt.densify(model).named_modules()} == names


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
