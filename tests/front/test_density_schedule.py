"""A density that falls: by which rule, which blocks, and with what the optimizer goes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.errors import ConfigError, TrainingError
from graphopt.kernels import BlockLayout, BlockSparseLinear
from graphopt.training import BlockTopology, DensitySchedule


def dense_start() -> BlockSparseLinear:
    return BlockSparseLinear.from_dense(nn.Linear(40, 16), 1.0, block_out=8, block_in=4)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_the_density_falls_by_the_cubic_rule() -> None:
    layer = dense_start()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    schedule = DensitySchedule(
        layer, optimizer, final_density=0.2, total_steps=40, start=0.25, stop=0.75, interval=5
    )
    exact = [schedule.density_at(step) for step in (0, 10, 15, 20, 30, 40)]
    assert exact == pytest.approx([1, 1, 0.2 + 0.8 * 0.75**3, 0.2 + 0.8 / 8, 0.2, 0.2])
    counts = []
    for step in range(1, 41):
        train_step(layer, optimizer, step)
        before = layer.values
        assert schedule.step() == (step in (15, 20, 25, 30) and layer.values is not before)
        counts.append(layer.layout.blocks_per_row_tile.tolist())
    # 10 column groups: 5.375, 3, 2.1 and 2 blocks in a row tile.
    assert counts == [[10, 10]] * 14 + [[5, 5]] * 5 + [[3, 3]] * 5 + [[2, 2]] * 16


def test_the_weakest_blocks_go_with_their_state() -> None:
    layer = dense_start()
    bias = layer.bias
    assert bias is not None
    model = nn.Sequential(layer)
    optimizer = torch.optim.Adam([{"params": model.parameters(), "lr": 1e-3}])
    schedule = DensitySchedule(
        model, optimizer, final_density=0.3, total_steps=2, stop=1, interval=1
    )
    train_step(model, optimizer, 1)
    before = {"values": layer.values.detach(), **optimizer.state[layer.values]}
    gradient, bias_state = layer.values.grad, optimizer.state[bias]
    columns, old = layer.columns.tolist(), layer.values
    assert gradient is not None
    strength = before["values"].double().square().sum((1, 2)).view(2, 10)
    assert schedule.step()
    share = 0.3 + 0.7 / 8
    expected = [
        place
        for tile in range(2)
        for place in sorted(
            sorted(range(10), key=lambda j: -strength[tile, j])[: round(10 * share)]
        )
    ]
    assert layer.columns.tolist() == expected
    kept = [tile * 10 + place for tile, place in zip(layer.rows.tolist(), expected, strict=True)]
    assert [columns[i] for i in kept] == expected
    after = {"values": layer.values.detach(), **optimizer.state[layer.values]}
    for name, value in before.items():
        assert torch.equal(after[name], value[kept] if value.dim() else value), name
    assert layer.values.grad is not None
    assert torch.equal(layer.values.grad, gradient[kept])
    assert old not in optimizer.state
    assert optimizer.state[bias] is bias_state
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    train_step(model, optimizer, 2)
    assert schedule.step()
    assert layer.layout.blocks == 6
    train_step(model, optimizer, 3)
    assert not schedule.step()


def test_unequal_row_tiles_lose_equal_shares_and_keep_a_block() -> None:
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[0, :8] = mask[1, :1] = True
    layer = BlockSparseLinear(BlockLayout.from_mask(mask, 8, 4))
    sparser = BlockSparseLinear(BlockLayout.from_scores(torch.rand(2, 10), 0.1, 8, 4))
    model = nn.ModuleList([layer, sparser])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = DensitySchedule(
        model, optimizer, final_density=0.15, total_steps=1, stop=1, interval=1
    )
    assert schedule.step()
    assert layer.layout.blocks_per_row_tile.tolist() == [4, 1, 0]
    assert sparser.layout.blocks_per_row_tile.tolist() == [1, 1]


@pytest.mark.parametrize("stopped", [3, 7, 12])
def test_a_resumed_training_gives_equal_bits(stopped: int) -> None:
    def start() -> tuple[Any, Any, Any, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(dense_start())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        schedule = DensitySchedule(
            model, optimizer, final_density=0.2, total_steps=20, stop=0.5, interval=3
        )
        topology = BlockTopology(model, optimizer, total_steps=20, drop_fraction=0.9, interval=3)
        return schedule, topology, model, optimizer

    def run(parts: tuple[Any, Any, Any, Any], steps: range) -> dict[str, torch.Tensor]:
        schedule, topology, model, optimizer = parts
        for step in steps:
            train_step(model, optimizer, step)
            schedule.step()
            topology.step()
        return copy.deepcopy(dict(model.state_dict()))

    first = start()
    run(first, range(stopped))
    saved = [copy.deepcopy(part.state_dict()) for part in first]
    expected = run(first, range(stopped, 20))
    resumed = start()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    found = run(resumed, range(stopped, 20))
    assert expected["0.values"].shape == (4, 8, 4)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_density": 0.0}, "above 0 and at most 1"),
        ({"start": 0.5, "stop": 0.5}, "0 <= start < stop <= 1, got 0.5, 0.5 and 0.5"),
        ({"interval": 0}, "at least 1 step, got 0 and 40"),
        ({"total_steps": 1}, "got 10 and 0 of 1 steps"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    layer = dense_start()
    arguments: dict[str, Any] = {"final_density": 0.5, "total_steps": 100, "interval": 10}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=message):
        DensitySchedule(layer, optimizer, **{**arguments, **options})


def test_models_whose_density_cannot_change_are_refused() -> None:
    linear = nn.Sequential(nn.Linear(40, 40))
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match="got Sequential without"):
        DensitySchedule(linear, optimizer, final_density=0.5, total_steps=100)
    layer = dense_start()
    with pytest.raises(TrainingError, match="does not hold the values"):
        DensitySchedule(layer, optimizer, final_density=0.5, total_steps=100)
