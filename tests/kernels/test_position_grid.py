"""Positions on a grid are averaged to the grid of fewer patches."""

from __future__ import annotations

import pytest
import torch

from graphopt.kernels.position_grid import PositionGrid


def test_positions_of_a_full_grid_are_the_table_itself() -> None:
    grid = PositionGrid(dim=1, before=0, grid=(2, 3), patch_dims=(2, 3))
    table = torch.randn(1, 6, 4)
    assert grid(table, torch.zeros(5, 8, 2, 3)) is table


def test_each_position_is_the_mean_of_its_area_and_class_tokens_stay() -> None:
    grid = PositionGrid(dim=1, before=1, grid=(4, 4), patch_dims=(2, 3))
    places = torch.arange(16.0)
    table = torch.cat([torch.tensor([-7.0]), places, torch.tensor([-8.0, -9.0])])
    fitted = grid(table.view(1, -1, 1).expand(1, -1, 3), torch.zeros(5, 8, 2, 2))
    assert fitted.shape == (1, 7, 3)
    for channel in range(3):
        assert fitted[0, :, channel].tolist() == [-7, 2.5, 4.5, 10.5, 12.5, -8, -9]


def test_rows_and_columns_are_told_apart_wherever_they_lie() -> None:
    grid = PositionGrid(dim=0, before=0, grid=(2, 4), patch_dims=(1, 2))
    fitted = grid(torch.arange(8.0)[:, None], torch.zeros(5, 2, 2, 6))
    assert fitted.flatten().tolist() == [0.5, 2.5, 4.5, 6.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_position_gets_the_gradient_of_what_it_is_in(dtype: torch.dtype) -> None:
    grid = PositionGrid(dim=1, before=1, grid=(4, 4), patch_dims=(2, 3))
    table = torch.zeros(1, 17, 2, dtype=dtype, requires_grad=True)
    grid(table, torch.zeros(1, 8, 2, 2)).sum().backward()
    assert table.grad is not None
    assert table.grad[0, :, 0].tolist() == [1.0, *[0.25] * 16]
