"""Pruning: structure, budgets, overrides, scores, repair, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from coupled_models import COUPLED
from torch import Tensor, nn
from torch.nn import functional
from zoo import EXAMPLE, find_case, without_dropout

from graphopt.capture import capture
from graphopt.passes.axes import axes_of
from graphopt.passes.base import Context
from graphopt.passes.calibration import Calibration
from graphopt.passes.compress.prune_channels import PruneChannels
from graphopt.passes.costs import Comparison, Costs
from graphopt.passes.errors import PreconditionError
from graphopt.passes.facts import total_cost
from graphopt.passes.manager import PassManager
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.verifier import Verifier, relative_error

FINE = PruneChannels(round_to=1)


def program_of(name: str) -> Program:
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE)
    return capture(without_dropout(case.build()), kwargs or args)


def pruned(program: Program, step: PruneChannels = FINE, **context: Any) -> Plan:
    return PassManager(passes=(step,), context=Context(**context)).run(program)


def reasons(plan: Plan) -> dict[str, str]:
    return {miss.target: miss.reason for miss in plan.misses}


class CorrelatedUnits(nn.Module):
    """Hidden units in pairs that nearly agree; the loudest pairs hide what matters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 32)
        self.down = nn.Linear(32, 6)
        with torch.no_grad():
            half = torch.randn(16, 12)
            self.up.weight.copy_(torch.cat([half, half + 0.05 * torch.randn(16, 12)]))
            self.up.bias.copy_(self.up.bias[:16].repeat(2))
            self.up.weight[16:20] *= 4
            self.up.weight[:4] *= 4

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(functional.gelu(self.up(x)))
        return result


def rows(seed: int, count: int = 512) -> Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


def error_of(step: PruneChannels, *, calibrated: bool = True) -> float:
    torch.manual_seed(0)
    model = CorrelatedUnits()
    program = capture(model, rows(1, 4))
    fresh = rows(2)
    with torch.no_grad():
        expected = model(fresh)
        data = Calibration([{"x": rows(1)}]) if calibrated else None
        pruned(program, step, budget=0.5, calibration=data)
        return relative_error(program(fresh), expected)


@pytest.mark.parametrize("name", ["mpt", "t5", "swin", "convnext", "resnet"])
def test_models_stay_runnable_and_meet_the_budget(name: str) -> None:
    program = program_of(name)
    plan = pruned(program, budget=0.6, training=True)
    assert plan.totals is not None
    assert total_cost(program).flops == plan.totals.after.flops
    assert plan.totals.after.flops <= 0.6 * plan.totals.before.flops
    assert Verifier(program, training=False).eager_refusal() is None


def test_alibi_keeps_the_heads() -> None:
    plan = pruned(program_of("mpt"), budget=0.8)
    heads = [reason for target, reason in reasons(plan).items() if target.endswith("(4 heads)")]
    assert heads
    assert all("arange" in reason for reason in heads)


def test_the_eager_path_of_packed_attention_is_refused_with_its_reason() -> None:
    program = program_of("transformer-encoder")
    pruned(program, budget=0.6)
    refusal = Verifier(program, training=False).eager_refusal()
    assert refusal is not None
    assert "the original forward fails over the rewritten modules" in refusal


@pytest.mark.parametrize("share", [0.35, 0.5, 0.77, 0.93])
def test_predicted_flops_are_those_of_the_changed_program(share: float) -> None:
    for name in ("concatenation", "gates", "shared-keys", "token-mixer"):
        build, inputs = COUPLED[name]
        program = capture(build().eval(), inputs)
        planned = PassManager(passes=(FINE,), context=Context(budget=share)).propose(program)
        plan = pruned(program, budget=share)
        assert plan.totals is not None
        assert total_cost(program).flops == plan.totals.after.flops
        assert planned.totals == plan.totals


def test_a_budget_out_of_reach_is_said() -> None:
    program = program_of("mixtral")
    plan = pruned(program, budget=0.2)
    assert plan.totals is not None
    left = plan.totals.after.flops / plan.totals.before.flops
    assert f"groups that can shrink leave {left:.1%}" in reasons(plan)["(model)"]
    assert any(f"is not met: {left:.1%} are left" in note for note in plan.notes)


def test_patterns_ignore_and_override() -> None:
    plan = pruned(
        program_of("bert"),
        budget=0.8,
        ignore=("re:layer\\.0.*query",),
        keep={"re:layer\\.0\\.intermediate": 1.0, "re:layer\\.1\\.intermediate": 0.25},
    )
    said = reasons(plan)
    assert said["encoder.layer.0.attention.self.query.weight (4 heads)"].startswith("ignored by")
    whole = said["encoder.layer.0.intermediate.dense.weight (64 hidden units)"]
    assert whole == "it is kept whole by a pattern"
    summaries = {change.target: change.summary for change in plan.changes}
    assert summaries["encoder.layer.1.intermediate.dense.weight"] == "64 -> 16 hidden units"


@pytest.mark.parametrize("step", [1, 4, 8])
def test_sizes_are_multiples(step: int) -> None:
    program = program_of("sequential")
    pruned(program, PruneChannels(round_to=step), budget=0.7)
    width = program.model.get_parameter("0.weight").shape[0]
    assert width % step == 0
    assert width == {1: 44, 4: 44, 8: 40}[step]


def test_attributes_follow() -> None:
    build, inputs = COUPLED["folded-heads"]
    program = capture(build(), inputs)
    pruned(program, budget=0.6)
    heads, query = program.model.heads, program.module("query")
    assert heads in (1, 2, 3)
    width = program.model.get_parameter("query.weight").shape[0]
    assert query.out_features == width == 6 * heads
    assert Verifier(program, training=False).eager_refusal() is None


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 16)
            self.second = nn.Linear(8, 16)
            self.second.weight = self.first.weight
            self.last = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(self.first(x).relu() + self.second(x).relu())
            return result

    program = capture(Tied(), torch.randn(3, 8))
    pruned(program, budget=0.5, calibration=Calibration([{"x": torch.randn(64, 8)}]))
    first, second = program.module("first"), program.module("second")
    assert first.weight is second.weight
    assert program.model.get_parameter("first.weight").shape[0] < 16


def test_repair_beats_none_and_scores_from_data_beat_magnitude() -> None:
    magnitude = error_of(PruneChannels(round_to=1), calibrated=False)
    repaired_magnitude = error_of(PruneChannels(round_to=1, scores="magnitude"))
    repaired = error_of(PruneChannels(round_to=1))
    assert repaired_magnitude < 0.9 * magnitude
    assert repaired < 0.5 * repaired_magnitude


@pytest.mark.parametrize("bias", [True, False])
def test_the_predicted_error_is_the_measured_one(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6, bias=bias))
    data = rows(3)
    program = capture(model, data[:4])
    with torch.no_grad():
        expected = model(data)
        plan = pruned(program, budget=0.5, calibration=Calibration([{"input": data}]))
        actual = program(data)
    scale = expected - expected.mean(0) if bias else expected
    measured = ((actual - expected).norm() / scale.norm()).item()
    predicted = plan.changes[0].predicted_error
    assert predicted is not None
    # float32 outputs against float64 statistics
    assert abs(measured - predicted) <= 1e3 * torch.finfo(torch.float32).eps


def test_everything_kept_is_the_same_function() -> None:
    plan = pruned(program_of("bert"), budget=1.0)
    assert not plan.changes


def test_repaired_convolutions_solve_the_least_squares_problem() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, stride=2, padding=1)
    )
    images = torch.randn(16, 3, 9, 9)
    program = capture(model, images[:2])
    with torch.no_grad():
        first = model.get_parameter("0.weight").detach().clone()
        hidden = model[1](model[0](images)).double()
        targets = model(images).double().flatten(2).transpose(1, 2).reshape(-1, 5)
    step = PruneChannels(round_to=1, damping=1e-9)
    pruned(program, step, budget=0.6, calibration=Calibration([{"input": images}]))
    left = program.model.get_parameter("0.weight").detach()
    kept = [unit for unit in range(8) if any(torch.equal(row, first[unit]) for row in left)]
    assert 1 < len(kept) == len(left) < 8
    unfolded = functional.unfold(hidden[:, kept], 3, stride=2, padding=1).transpose(1, 2)
    design = unfolded.reshape(targets.shape[0], -1)
    design = torch.cat([design, torch.ones(len(design), 1, dtype=torch.float64)], 1)
    solved = torch.linalg.lstsq(design, targets).solution
    weight, bias = (program.model.get_parameter(f"2.{name}") for name in ("weight", "bias"))
    fitted = torch.cat([weight.detach().reshape(5, -1).T, bias.detach()[None]])
    best = (design @ solved - targets).norm()
    assert (design @ fitted.double() - targets).norm() <= best * (1 + 1e-4)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_weights_keep_their_order_in_memory(order: torch.memory_format) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1)
    )
    nn.utils.convert_conv2d_weight_memory_format(model, order)
    program = capture(model, torch.randn(3, 1, 9, 9))
    pruned(program, budget=0.5)
    weights = [value for value in program.model.parameters() if value.dim() == 4]
    assert [value.shape[1] for value in weights] != [1, 16, 16]
    for value in weights:
        assert value.stride() == torch.empty(value.shape, memory_format=order).stride()


def test_padded_rows_are_not_counted() -> None:
    program = program_of("bert")
    batch = dict(program.example)
    mask = batch["attention_mask"]
    node = next(
        m.inputs[0]
        for g in axes_of(program).groups()
        for m in g.of("consumer")
        if m.parameter == "encoder.layer.0.output.dense.weight" and m.dim == 1
    )
    counted = Calibration([batch]).statistics(program, [node])
    assert counted.count == int(mask.sum()) < mask.numel()


class Slower(Costs):
    """Says that wide layers are slower when smaller, as a real machine can."""

    def compare(self, *args: Any, **kwargs: Any) -> Comparison:
        found = super().compare(*args, **kwargs)
        return Comparison(dense_ms=found.dense_ms, candidate_ms=2 * found.dense_ms, ratio=0.5)


def test_what_measures_slower_is_kept() -> None:
    plan = pruned(program_of("sequential"), budget=0.6, costs=Slower(budget_s=0.001))
    assert not plan.changes
    text = reasons(plan)["0.weight (64 hidden units)"]
    assert text.endswith("hidden units measured 0.50x, kept as it is")


class Undecided(Costs):
    """Times that do not tell which one is faster, as of layers that are all overhead."""

    def compare(self, *args: Any, **kwargs: Any) -> Comparison:
        found = super().compare(*args, **kwargs)
        time_ms = found.dense_ms
        return Comparison(dense_ms=time_ms, candidate_ms=time_ms, ratio=1.0, decided=False)


def test_what_times_cannot_tell_apart_is_pruned() -> None:
    plan = pruned(program_of("sequential"), budget=0.6, costs=Undecided(budget_s=0.001))
    assert [change.target for change in plan.changes] == ["0.weight"]


def test_costs_of_heads_count_the_attention_between_their_projections() -> None:
    case = find_case("bert")
    args, kwargs = case.call(1, 60)
    program = capture(without_dropout(case.build()), kwargs or args)
    before = total_cost(program).flops
    offers = PruneChannels(round_to=1).offer(program, Context()).candidates
    least = min((c for c in offers if "heads" in c.change.summary), key=lambda c: c.after.flops)
    assert 0 < least.after.flops < least.before.flops <= before
    plan = pruned(program, PruneChannels(share=0.5))
    saved = sum(change.before.flops - change.after.flops for change in plan.changes)
    assert any("heads" in change.summary for change in plan.changes)
    assert before - total_cost(program).flops == saved


def test_what_measures_faster_is_pruned_with_its_times() -> None:
    model = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 64))
    program = capture(model, torch.randn(64, 64))
    plan = pruned(program, PruneChannels(), budget=0.1, costs=Costs(budget_s=0.02))
    (change,) = plan.changes
    assert change.before.latency_ms is not None
    assert change.after.latency_ms is not None
    assert change.after.latency_ms < change.before.latency_ms


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (PruneChannels(share=1.5), "needs 0 < share <= 1"),
        (PruneChannels(scores="random"), "scores by 'auto', 'magnitude' or 'obs', got 'random'"),
        (PruneChannels(scores="obs"), "needs calibration data; pass calibration="),
    ],
)
def test_impossible_options_are_refused(step: PruneChannels, message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        pruned(capture(nn.Linear(4, 4), torch.randn(2, 4)), step)
