"""A training that stops in the middle and resumes ends where one that never stopped ends."""

from __future__ import annotations

import json
import os
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphopt
from graphopt.errors import CheckpointError
from graphopt.kernels import BlockLayout, BlockSparseLinear
from graphopt.kernels.gates import Gate
from graphopt.training import (
    BlockTopology,
    ComputeClock,
    DensitySchedule,
    Ledger,
    SampleGate,
    WithSampleIds,
    load_training,
    save_training,
)
from graphopt.training.random_states import random_states, restore_random_states

SIZE = 48


class Skipping(Gate):
    """A layer that a random gate leaves out now and then."""

    def __init__(self) -> None:
        super().__init__(seed=5)
        self.layer = nn.Linear(16, 16)
        self.decisions: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        runs = bool(torch.rand((), generator=self.generator()) < 0.5 + self.progress)
        self.decisions.append(runs)
        result: Tensor = self.layer(x) if runs else x
        return result


@dataclass
class Run:
    """All parts of a training."""

    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    clock: ComputeClock
    schedule: torch.optim.lr_scheduler.LRScheduler
    gate: SampleGate
    topology: BlockTopology
    ledger: Ledger

    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def built(path: Path) -> Run:
    torch.manual_seed(0)
    sparse = BlockSparseLinear(BlockLayout.from_scores(torch.rand(2, 8), 0.5, 8, 2))
    model = nn.Sequential(sparse, nn.Dropout(0.2), Skipping(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clock = ComputeClock(model, planned_flops=2e6)
    return Run(
        model=model,
        optimizer=optimizer,
        clock=clock,
        schedule=clock.learning_rate(optimizer),
        gate=SampleGate(SIZE, progress=lambda: clock.progress),
        topology=BlockTopology(model, optimizer, total_steps=30, interval=3, drop_fraction=0.6),
        ledger=Ledger(path),
    )


def trained(run: Run, steps: int) -> list[tuple[Any, ...]]:
    """Train some steps; return everything that tells one run from another."""
    x = torch.randn(SIZE, 16, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x[:, :4].argmax(1))
    own = torch.Generator()
    loader = DataLoader(WithSampleIds(data), batch_size=8, sampler=run.gate, generator=own)
    found: list[tuple[Any, ...]] = []
    while True:
        for (inputs, labels), ids in loader:
            with run.ledger.step(samples=len(ids)) as entry:
                losses = nn.functional.cross_entropy(run.model(inputs), labels, reduction="none")
                loss = (losses * run.gate.weights(ids)).mean()
                run.optimizer.zero_grad()
                loss.backward()
                run.optimizer.step()
                entry.loss = loss
            run.gate.update(ids, losses)
            moved = run.topology.step()
            run.clock.step(entry)
            run.schedule.step()
            rate = run.optimizer.param_groups[0]["lr"]
            noise = (random.random(), float(np.random.rand()))
            found.append((entry.loss, entry.flops, moved, rate, ids.tolist(), noise))
            if len(found) == steps:
                return found


def without_times(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("stop", [1, 5, 15])
def test_a_resumed_training_is_the_same_to_the_last_bit(tmp_path: Path, stop: int) -> None:
    random.seed(0)
    np.random.seed(0)
    whole = built(tmp_path / "whole.jsonl")
    generators = random_states()
    expected = trained(whole, 20)
    assert any(step[2] for step in expected[5:])  # blocks move after the resume, too
    restore_random_states(generators)
    stopped = built(tmp_path / "run.jsonl")
    restore_random_states(generators)
    begun = trained(stopped, stop)
    save_training(tmp_path / "saved", **stopped.parts())
    trained(stopped, 2)  # lost: the run dies here
    resumed = built(tmp_path / "run.jsonl")
    random.seed(9)
    torch.manual_seed(9)
    load_training(tmp_path / "saved", **resumed.parts())
    assert begun + trained(resumed, 20 - stop) == expected
    assert without_times(tmp_path / "run.jsonl") == without_times(tmp_path / "whole.jsonl")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    decisions = [run.model[2].decisions for run in (whole, stopped, resumed)]
    assert decisions[1][:stop] + decisions[2] == decisions[0]  # type: ignore[operator,index]
    assert len(set(decisions[0])) == 2  # type: ignore[arg-type]


def test_layers_that_shrank_get_their_sizes_back(tmp_path: Path) -> None:
    def shrinking() -> tuple[nn.Module, torch.optim.Optimizer, DensitySchedule]:
        torch.manual_seed(0)
        model = nn.Sequential(
            BlockSparseLinear.from_dense(nn.Linear(16, 16), density=1.0, block_out=4, block_in=4)
        )
        optimizer = torch.optim.Adam(model.parameters())
        schedule = DensitySchedule(
            model, optimizer, final_density=0.25, total_steps=20, stop=1, interval=2
        )
        return model, optimizer, schedule

    def steps(
        model: nn.Module, optimizer: torch.optim.Optimizer, schedule: DensitySchedule, count: int
    ) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(4, 16)).square().sum().backward()
            optimizer.step()
            schedule.step()

    model, optimizer, schedule = shrinking()
    steps(model, optimizer, schedule, 10)
    save_training(tmp_path, model=model, optimizer=optimizer, topology=schedule)
    steps(model, optimizer, schedule, 10)
    again, new_optimizer, new_schedule = shrinking()
    load_training(tmp_path, model=again, optimizer=new_optimizer, topology=new_schedule)
    steps(again, new_optimizer, new_schedule, 10)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_an_interruption_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(4, 4)
    save_training(tmp_path / "saved", model=model)
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    nn.init.zeros_(model.weight)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "chmod", interrupted)
    monkeypatch.setattr(Path, "chmod", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_training(tmp_path / "saved", model=model)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    save_training(tmp_path / "saved", model=model)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} != before


def test_nothing_in_a_checkpoint_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading one works without any unpickling."""
    model, optimizer = nn.Linear(4, 4), torch.optim.SGD([torch.ones(1)])
    save_training(tmp_path, model=model, optimizer=optimizer)
    files = ["training.json", "training.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    for owner, name in (
        (pickle, "Unpickler"),
        (pickle, "load"),
        (pickle, "loads"),
        (torch, "load"),
    ):
        monkeypatch.setattr(owner, name, None)
    load_training(tmp_path, model=model, optimizer=optimizer)


def test_optimizers_with_options_and_several_groups_come_back(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].bias.requires_grad_(False)
        extra = nn.Parameter(torch.ones(2))  # a loss has parameters of its own
        groups = [
            {"params": list(model[0].parameters()), "lr": 0.1, "betas": (0.5, 0.6)},
            {"params": [model[1].weight, extra], "weight_decay": 0.0},
        ]
        return model, torch.optim.AdamW(groups, lr=torch.tensor(0.3), amsgrad=True)

    model, optimizer = made()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    save_training(tmp_path, model=model, optimizer=optimizer)
    again, loaded = made()
    loaded.param_groups[0]["lr"] = 77.0
    load_training(tmp_path, model=again, optimizer=loaded)
    before, after = optimizer.state_dict(), loaded.state_dict()
    assert str(before["param_groups"]) == str(after["param_groups"])
    assert before["state"].keys() == after["state"].keys() == {0, 1, 2}
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(after["state"][index][key], value)
    other = torch.optim.AdamW([*model[1].parameters(), *model[0].parameters()])  # type: ignore[index]
    with pytest.raises(CheckpointError, match="expected an optimizer with 2 groups"):
        load_training(tmp_path, model=again, optimizer=other)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    clock = ComputeClock(model, planned_steps=3)
    save_training(tmp_path / "saved", model=model, clock=clock)
    with pytest.raises(CheckpointError, match=r"parts that were saved in .*, clock, got none"):
        load_training(tmp_path / "saved", model=model)
    with pytest.raises(CheckpointError, match=r"weight is \[4, 4\] torch.float32 instead of"):
        load_training(tmp_path / "saved", model=nn.Linear(8, 4), clock=clock)
    with pytest.raises(CheckpointError, match="bias is too much"):
        load_training(tmp_path / "saved", model=nn.Linear(4, 4, bias=False), clock=clock)
    with pytest.raises(CheckpointError, match=r"lacks training\.json"):
        load_training(tmp_path, model=model, clock=clock)
    with pytest.raises(CheckpointError, match="graphopt did not write"):
        save_training(Path(__file__).parent, model=model)

    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"function": print}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    with pytest.raises(CheckpointError, match="state of odd holds what no file can"):
        save_training(tmp_path / "odd", model=model, odd=Odd())
    tensors = load_file(tmp_path / "saved" / "training.safetensors")
    tensors.pop("0")
    save_file(tensors, tmp_path / "saved" / "training.safetensors")
    with pytest.raises(CheckpointError, match="lacks the tensor '0'"):
        load_training(tmp_path / "saved", model=model, clock=clock)
    (tmp_path / "saved" / "training.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not what graphopt writes"):
        load_training(tmp_path / "saved", model=model, clock=clock)


def test_an_optimized_model_wants_its_own_changes(tmp_path: Path) -> None:
    def optimized(recipe: list[str]) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 8))
        return graphopt.optimize(model.eval(), torch.randn(2, 4, 4), recipe=recipe, measure=False)

    small = optimized(["fold-batch-norm"])
    save_training(tmp_path, model=small)
    load_training(tmp_path, model=optimized(["fold-batch-norm"]))
    with pytest.raises(CheckpointError, match="a model with other changes"):
        load_training(tmp_path, model=optimized(["fuse-projections"]))
