"""Progress follows what was spent, and gates and learning rates follow progress."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphopt.errors import ConfigError
from graphopt.kernels.gates import Gate
from graphopt.training import ComputeClock, Ledger, schedules


def gated() -> tuple[nn.Module, Gate]:
    gate = Gate(seed=3)
    return nn.Sequential(nn.Linear(4, 4), gate, nn.Linear(4, 4)), gate


def test_progress_is_operations_spent_over_planned() -> None:
    model, gate = gated()
    clock = ComputeClock(model, planned_flops=1000)
    assert (gate.step, gate.progress) == (0, 0.0)
    assert clock.step(100) == 0.1
    assert (gate.step, gate.progress) == (1, 0.1)
    clock.charge(400)
    assert clock.progress == 0.5
    entry = Ledger().charge(700, kind="train")
    assert clock.step(entry) == 1.0
    assert (clock.steps, clock.consumed_flops, clock.finished) == (2, 1200, True)
    assert (gate.step, gate.progress) == (2, 1.0)


def test_a_clock_over_steps_needs_no_operations() -> None:
    clock = ComputeClock(gated()[0], planned_steps=4)
    assert [clock.step(), clock.step(10**9)] == [0.25, 0.5]
    assert clock.consumed_flops == 10**9


def test_what_is_cheaper_does_not_end_the_schedule_early() -> None:
    """Half of the operations per step make twice as many steps, not half of a schedule."""
    clocks = {cost: ComputeClock(nn.Identity(), planned_flops=1000) for cost in (100, 50)}
    for cost, clock in clocks.items():
        while not clock.finished:
            clock.step(cost)
    assert [clock.steps for clock in clocks.values()] == [10, 20]


def test_the_learning_rate_follows_the_clock() -> None:
    model, _ = gated()
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.1} for p in model.parameters()][:2])
    optimizer.param_groups[1]["lr"] = 0.2
    clock = ComputeClock(model, planned_flops=1000)
    scheduler = clock.learning_rate(optimizer, warmup=0.2)
    rates = []
    for cost in (100, 100, 300, 500):
        optimizer.step()
        clock.step(cost)
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    shares = [0.5 * 0.9, 0.8, 0.5, 0.0]
    assert rates == [pytest.approx([0.1 * share, 0.2 * share]) for share in shares]


def test_a_state_brings_clock_and_gates_back() -> None:
    model, gate = gated()
    clock = ComputeClock(model, planned_flops=1000)
    clock.step(100)
    clock.step(200)
    again = ComputeClock(gated()[0], planned_flops=1000)
    again.load_state_dict(clock.state_dict())
    (found,) = (module for module in again._gates)
    assert (found.step, found.progress) == (gate.step, gate.progress) == (2, 0.3)
    assert found.generator().initial_seed() == gate.generator().initial_seed()


@pytest.mark.parametrize(
    "options", [{}, {"planned_flops": 1, "planned_steps": 1}, {"planned_steps": 0}]
)
def test_a_clock_wants_one_plan(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="either planned_flops or planned_steps"):
        ComputeClock(nn.Identity(), **options)


def test_a_clock_over_operations_wants_to_know_them() -> None:
    clock = ComputeClock(nn.Identity(), planned_flops=10)
    with pytest.raises(ConfigError, match="pass the entry"):
        clock.step()
    assert clock.steps == 0


MONOTONOUS = [
    partial(schedules.linear, start=1, stop=0.25),
    partial(schedules.cosine, start=1, stop=0.25),
    partial(schedules.cubic, start=1, stop=0.25),
    partial(schedules.cubic, start=1, stop=0.25, until=0.4),
]


@pytest.mark.parametrize("schedule", MONOTONOUS)
@given(first=st.floats(0, 1), second=st.floats(0, 1))
def test_schedules_fall_from_start_to_stop(
    schedule: partial[float], first: float, second: float
) -> None:
    assert [schedule(0.0), schedule(1.0)] == [1, 0.25]
    early, late = sorted((first, second))
    assert schedule(early) >= schedule(late) - 1e-15


def test_schedules_have_the_values_of_their_equations() -> None:
    assert schedules.linear(0.35, 1, 0, until=0.7) == pytest.approx(0.5)
    assert schedules.cosine(0.25, 1, 0) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert schedules.cubic(0.5, 1, 0.2) == pytest.approx(0.2 + 0.8 / 8)
    assert [schedules.kept_share(c) for c in (0, 0.35, 0.7, 1)] == pytest.approx([0.5, 0.75, 1, 1])
    assert schedules.warmup_linear(0.0) > 0
    assert schedules.warmup_linear(0.025, warmup=0.05) == pytest.approx(0.5 * 0.975)
    assert schedules.warmup_linear(1.0) == 0
    with pytest.raises(ConfigError, match="warm-up"):
        schedules.warmup_linear(0.5, warmup=1)
    with pytest.raises(ConfigError, match="end in"):
        schedules.linear(0.5, 1, 0, until=0)
