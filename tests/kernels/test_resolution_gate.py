"""Images are small at first, full at the end and in evaluation."""

from __future__ import annotations

import pytest
import torch

from graphopt.kernels.resolution_gate import ResolutionGate


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 16), (0.5, 16), (0.65, 24), (0.79, 32), (0.8, 32), (1.0, 32)],
)
def test_sizes_follow_the_schedule(progress: float, expected: int) -> None:
    gate = ResolutionGate(start=0.5, hold=0.5, full_at=0.8, multiple=4)
    gate.advance(1, progress)
    assert gate(torch.zeros(2, 3, 32, 32)).shape == (2, 3, expected, expected)


def test_sides_shrink_alike_to_multiples_and_never_grow() -> None:
    gate = ResolutionGate(start=0.5, multiple=4)
    gate.advance(1, 0.0)
    assert gate(torch.zeros(1, 1, 28, 50)).shape[2:] == (16, 24)
    assert gate(torch.zeros(1, 1, 3, 3)).shape[2:] == (3, 3)


def test_each_shown_pixel_is_the_mean_of_its_area() -> None:
    gate = ResolutionGate(start=0.5, multiple=1)
    gate.advance(1, 0.0)
    images = torch.arange(16.0).view(1, 1, 4, 4)
    assert gate(images).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_images_stay_in_evaluation_and_while_nobody_reports_progress() -> None:
    images = torch.randn(1, 1, 8, 8)
    gate = ResolutionGate()
    assert gate(images) is images
    gate.advance(1, 0.0)
    assert gate(images).shape != images.shape
    assert gate.eval()(images) is images
