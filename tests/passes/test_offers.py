"""What passes offer to a solver: levels, claims, and dense parameters that compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import find_case, without_dropout

from graphopt.capture import capture
from graphopt.passes.base import Candidate, Context, Pass, set_tensor
from graphopt.passes.calibration import Calibration
from graphopt.passes.compress.levels import slower
from graphopt.passes.costs import Costs
from graphopt.passes.manager import load_state
from graphopt.passes.program import Program
from graphopt.passes.registry import pass_named
from graphopt.passes.snapshot import Snapshot
from graphopt.passes.verifier import observe, relative_error, rounding_bound

MODELS = {
    "prune-channels": ("bert-classifier", "gpt2", "llama", "cnn"),
    "factorize-low-rank": ("bert-classifier", "llama"),
    "sparsify-blocks": ("bert-classifier", "gpt2"),
    "gate-layers": ("bert-classifier", "gpt2", "cnn"),
}
CASES = [(name, model) for name, models in MODELS.items() for model in models]


def captured(name: str) -> tuple[Program, list[dict[str, Any]]]:
    """Return a program in evaluation mode and three batches for it."""
    case = find_case(name)
    torch.manual_seed(0)
    model = without_dropout(case.build()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # As initialized, attention is nearly uniform, and queries and keys hardly matter.
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    batches = []
    for length in (9, 7, 9):
        args, kwargs = case.call(4, length)
        batches.append(kwargs or args)
    program = capture(model, batches[0])
    names = list(program.example)
    return program, [
        b if isinstance(b, dict) else dict(zip(names, b, strict=False)) for b in batches
    ]


def context_of(batches: list[dict[str, Any]] | None) -> Context:
    return Context(calibration=None if batches is None else Calibration(batches))


def strongest(step: Pass, program: Program, context: Context) -> list[Candidate]:
    """Return the last candidate of every target: the strongest."""
    found = step.offer(program, context).candidates
    return list({candidate.change.target: candidate for candidate in found}.values())


@pytest.mark.parametrize("data", [False, True], ids=["weights", "data"])
@pytest.mark.parametrize(("name", "model"), CASES)
def test_reconstructed_parameters_compute_what_the_change_makes(
    name: str, model: str, data: bool
) -> None:
    program, batches = captured(model)
    context, step = context_of(batches if data else None), pass_named(name)
    candidates = strongest(step, program, context)
    assert candidates
    dense = observe(program, training=False, gradients=False).outputs
    bound, most = rounding_bound(program), 0.0
    for candidate in candidates:
        change = step.settle(program, candidate, context).change
        state = step.transfer(program, change, context)
        values = step.reconstruct(program, change, state)
        assert values is not None
        shapes = {name: program.model.get_parameter(name).shape for name in values}
        assert {name: value.shape for name, value in values.items()} == shapes
        snapshot = Snapshot(program)
        for parameter, value in values.items():
            set_tensor(program.model, parameter, value.to(torch.float32))
        rebuilt = observe(program, training=False, gradients=False).outputs
        snapshot.restore()
        snapshot = Snapshot(program)
        step.apply(program, change)
        load_state(program, state)
        changed = observe(program, training=False, gradients=False).outputs
        snapshot.restore()
        errors = [relative_error(a, b) for a, b in zip(rebuilt, changed, strict=True)]
        moved = [relative_error(a, b) for a, b in zip(changed, dense, strict=True)]
        assert max(errors) <= bound, candidate.change.target
        most = max(most, *moved)
    assert most > 100 * bound


def test_the_time_of_a_removed_block_is_measured_once_for_equal_blocks() -> None:
    program, _ = captured("bert-classifier")
    context = Context(costs=Costs(budget_s=0.001))
    found = pass_named("gate-layers").offer(program, context).candidates
    times = [candidate.before.latency_ms or 0.0 for candidate in found]
    assert all(candidate.after.latency_ms == 0 for candidate in found)
    assert {c.latency_source for item in found for c in (item.before, item.after)} == {"measured"}
    assert min(times) > 0
    assert times[:2] == times[2:]


def test_levels_that_are_slower_are_named_with_their_ratios() -> None:
    assert slower([("rank 8", 0.5)]) == "rank 8 measured 0.50x, not offered"
    found = slower([("rank 32", 0.9), ("rank 16", 0.7), ("rank 8", 0.8)])
    assert found == "rank 32 to rank 8 measured 0.70x to 0.90x, not offered"


def test_claims_let_pruning_share_what_factors_take_alone() -> None:
    program, _ = captured("bert-classifier")
    prune, factorize = (
        pass_named(name).offer(program, Context()).candidates
        for name in ("prune-channels", "factorize-low-rank")
    )
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    pruned = [item for item in prune if f"{name} structure" in item.shared]
    factors = [item for item in factorize if f"{name} structure" in item.exclusive]
    assert {item.change.target for item in pruned} == {name}
    assert {item.change.target for item in factors} == {name.removesuffix(".weight")}
    assert all(f"{name} format" in item.exclusive for item in factors)
    assert not any(item.exclusive for item in pruned)
