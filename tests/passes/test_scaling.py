"""FLOPs and parameters at other sizes equal those of the program that has them."""

from __future__ import annotations

import pytest
from coupled_models import COUPLED
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.capture import capture
from graphopt.passes.axes import axes_of
from graphopt.passes.base import Context
from graphopt.passes.compress.prune_channels import PruneChannels
from graphopt.passes.facts import total_cost
from graphopt.passes.manager import PassManager
from graphopt.passes.scaling import flops_with, parameters_with

NAMES = ("concatenation", "grouped", "gates", "shared-keys", "token-mixer", "tied-weight")


@pytest.mark.parametrize("name", NAMES)
def test_unchanged_sizes_change_nothing(name: str) -> None:
    build, inputs = COUPLED[name]
    program = capture(build(), inputs)
    sizes = {group.axis: group.size for group in axes_of(program).groups()}
    assert flops_with(program, sizes) == flops_with(program, {}) == total_cost(program).flops
    assert parameters_with(program, {}) == total_cost(program).parameters


@settings(max_examples=6)
@given(st.floats(0.2, 0.95), st.sampled_from(NAMES))
def test_predictions_are_exact(share: float, name: str) -> None:
    build, inputs = COUPLED[name]
    program = capture(build(), inputs)
    before = axes_of(program)
    sizes = {group.key: group.size for group in before.groups()}
    numbers = {group.key: group.axis for group in before.groups()}
    step = PruneChannels(round_to=1, share=share)
    candidates = step.propose(program, Context()).candidates
    new = {numbers[c.change.details["group"]]: int(c.change.details["count"]) for c in candidates}
    predicted = flops_with(program, new), parameters_with(program, new)
    assert all(new[numbers[key]] < size for key, size in sizes.items() if numbers[key] in new)
    PassManager(passes=(step,), context=Context()).run(program)
    cost = total_cost(program)
    assert predicted == (cost.flops, cost.parameters)
