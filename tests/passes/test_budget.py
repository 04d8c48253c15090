"""Budgets: what texts mean, what a model may spend, and sentences for what is no budget."""

from __future__ import annotations

import pytest

from graphopt.passes.base import Cost
from graphopt.passes.budget import Budget, parse_budget
from graphopt.passes.errors import ConfigError

DENSE = Cost(flops=1000, size_bytes=400, parameters=100, latency_ms=8.0)


@pytest.mark.parametrize(
    ("value", "resource", "allowed"),
    [
        (0.6, "flops", 600),
        ("60%", "flops", 600),
        ("60% flops", "flops", 600),
        ("50% latency", "latency", 4),
        ("12ms", "latency", 12),
        ("0.5 s", "latency", 500),
        ("25% parameters", "parameters", 25),
        ("5M parameters", "parameters", 5e6),
        ("50% bytes", "bytes", 200),
        ("40MB", "bytes", 40e6),
        ("2 MiB", "bytes", 2 * 2**20),
        ("2 GFLOPs", "flops", 2e9),
        (1, "flops", 1000),
    ],
)
def test_a_budget_is_a_share_or_an_amount_of_one_resource(
    value: float | str, resource: str, allowed: float
) -> None:
    budget = parse_budget(value)
    assert budget is not None
    assert budget.resource == resource
    assert budget.allowed(DENSE) == pytest.approx(allowed, rel=1e-12)
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize("value", ["abc", "120%", "0%", "-3ms", "0ms", "1.2.3%", "60% speed", ""])
def test_what_is_no_budget_is_refused_with_what_came(value: str) -> None:
    with pytest.raises(ConfigError, match="budget") as caught:
        parse_budget(value)
    assert repr(value) in str(caught.value)


def test_a_share_of_the_time_needs_a_measured_time() -> None:
    budget = Budget(resource="latency", amount=0.5, relative=True)
    with pytest.raises(ValueError, match="measured"):
        budget.allowed(Cost(flops=1, size_bytes=1, parameters=1))
