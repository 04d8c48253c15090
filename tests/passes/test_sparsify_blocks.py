"""Block-sparse layers: planted blocks found again, costs, refusals, undoing, saving."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from slower_costs import SlowerCosts
from torch import Tensor, nn
from typer.testing import CliRunner
from zoo import EXAMPLE, find_case, without_dropout

import graphopt
from graphopt.capture import capture
from graphopt.cli import app
from graphopt.kernels import BlockSparseLinear
from graphopt.passes.axes import Member, axes_of
from graphopt.passes.axis_flow import Role
from graphopt.passes.base import Context
from graphopt.passes.calibration import Calibration
from graphopt.passes.compress.block_details import BlockSizes
from graphopt.passes.compress.block_order import SparseMatrix
from graphopt.passes.compress.channel_slices import permuted
from graphopt.passes.compress.sparsify_blocks import SparsifyBlocks
from graphopt.passes.costs import Costs
from graphopt.passes.errors import PlanError, PreconditionError
from graphopt.passes.facts import facts_of, total_cost
from graphopt.passes.manager import PassManager, load_state
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.verifier import observe, relative_error, rounding_bound

SMALL = SparsifyBlocks(block_out=8, block_in=4)


class Gated(nn.Module):
    """A gated feed-forward block, normalised inside, between a projection and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.gate = nn.Linear(16, 32)
        self.up = nn.Linear(16, 32, bias=False)
        self.scale = nn.BatchNorm1d(32)
        self.down = nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        hidden = torch.sigmoid(self.gate(x)) * self.up(x)
        result: Tensor = self.head(self.norm(x + self.down(self.scale(hidden))))
        return result


def gated() -> Gated:
    torch.manual_seed(0)
    model = Gated().eval()
    model.scale.get_buffer("running_mean").normal_()
    model.scale.get_buffer("running_var").uniform_(0.5, 2)
    nn.init.normal_(model.scale.weight)
    return model


def inputs(rows: int = 64) -> Tensor:
    """Return correlated inputs with a mean, as activations have."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(16, 16, generator=generator) * torch.logspace(0, -2, 16)
    return torch.randn(rows, 16, generator=generator) @ mixing + 1


def sparsified(
    model: nn.Module, example: Any, context: Context, step: SparsifyBlocks = SMALL
) -> tuple[Program, Plan]:
    program = capture(model, example)
    return program, PassManager(passes=(step,), context=context).run(program)


def sparse_layer(model: nn.Module, name: str) -> BlockSparseLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, BlockSparseLinear)
    return layer


def kept_energy(dense: nn.Module, sparse: nn.Module, names: Sequence[str]) -> float:
    """Return the share of the squares of some weights that a model without refit keeps."""
    kept = sum(sparse_layer(sparse, name).values.detach().double().square().sum() for name in names)
    weights = [dense.get_parameter(f"{name}.weight").detach() for name in names]
    return float(kept / sum(weight.double().square().sum() for weight in weights))


def test_every_layer_keeps_half_its_blocks_and_runs_the_same_eagerly() -> None:
    model, x = gated(), inputs()
    program, plan = sparsified(model, x, Context())
    assert {record.target: record.summary for record in plan.changes} == {
        "first": "16 -> 16 in 4 of 8 blocks of 8x4",
        "gate": "16 -> 32 in 8 of 16 blocks of 8x4, units reordered",
        "up": "16 -> 32 in 8 of 16 blocks of 8x4",
        "down": "32 -> 16 in 8 of 16 blocks of 8x4",
    }
    assert [miss.target for miss in plan.misses] == ["head"]
    for name in ("first", "gate", "up", "down"):
        layout = sparse_layer(model, name).layout
        assert layout.is_balanced
        assert layout.density == 0.5
    for value in (x, x[:5]):
        assert relative_error(program(value), model(value)) <= rounding_bound(program)


@pytest.mark.parametrize("name", ["bert-classifier", "llama", "modernbert"])
def test_units_without_a_place_compute_the_same_in_any_order(name: str) -> None:
    """Also those that are normalised over, as in a residual stream or between two layers."""
    case = find_case(name)
    model = without_dropout(case.build())
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1, 0.1)
    program = capture(model, case.inputs(*EXAMPLE))
    groups = [group for group in axes_of(program).groups() if not group.placed]
    assert any(group.reasons and group.kind == "hidden units" for group in groups)
    assert any(not group.reasons and group.kind == "hidden units" for group in groups)
    before = observe(program, training=False, gradients=False).outputs
    state = permuted(program, [(group, torch.randperm(group.size).tolist()) for group in groups])
    assert all(not torch.equal(v, model.state_dict()[n]) for n, v in state.items())
    load_state(program, state)
    after = observe(program, training=False, gradients=False).outputs
    for new, old in zip(after, before, strict=True):
        assert relative_error(new, old) <= rounding_bound(program)


def test_planted_blocks_of_shuffled_units_are_found_again() -> None:
    """A model that is block-sparse in some order of its units loses nothing."""
    model = gated()
    mask = torch.zeros(4, 4, dtype=torch.bool)
    for tile, groups in enumerate(([0, 1], [2, 3], [0, 2], [1, 3])):
        mask[tile, groups] = True
    shuffle = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    rows = mask.repeat_interleave(8, 0).repeat_interleave(4, 1)[shuffle]
    # The consumer's column groups are made of halves of the producers' row tiles.
    columns = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0]).repeat_interleave(4)[shuffle]
    columns = torch.stack([columns, 1 - columns]).repeat_interleave(8, 0)
    with torch.no_grad():
        model.gate.weight.mul_(rows)
        model.up.weight.mul_(rows)
        model.down.weight.mul_(columns)
    x = inputs()
    expected = copy.deepcopy(model)(x)
    names = ("gate", "up", "down")
    context = Context(ignore=("first",))
    still = copy.deepcopy(model)
    sparsified(still, x, context, replace(SMALL, permute=False))
    dense = copy.deepcopy(model)
    program, _ = sparsified(model, x, context)
    assert kept_energy(dense, still, names) < 0.8
    assert kept_energy(dense, model, names) == pytest.approx(1)
    assert relative_error(model(x), expected) <= rounding_bound(program)


def test_a_matrix_in_another_order_is_seen_as_if_it_had_been_so_from_the_start() -> None:
    torch.manual_seed(0)
    weight, power = torch.randn(8, 12), torch.rand(12)
    sizes = BlockSizes(block_out=4, block_in=3, blocks=4)
    rows, columns = torch.randperm(8), torch.randperm(12)
    moved = SparseMatrix.of(weight, power, sizes)
    moved.reorder_rows(rows)
    moved.reorder_columns(columns)
    fresh = SparseMatrix.of(weight[rows][:, columns], power[columns], sizes)
    for role, size in (("producer", 8), ("consumer", 12)):
        member = Member("weight", 0, cast("Role", role), tuple(range(size)), ())
        np.testing.assert_array_equal(moved.units(member).energy, fresh.units(member).energy)
    assert torch.equal(weight[moved.rows][:, moved.columns].double(), moved.matrix)


def test_kept_energy_grows_on_a_real_architecture() -> None:
    case = find_case("llama")
    dense = case.build()
    kept = []
    for permute in (False, True):
        model = case.build()
        step = replace(SMALL, permute=permute)
        _, plan = sparsified(model, case.inputs(*EXAMPLE), Context(ignore=("self_attn",)), step)
        assert len(plan.changes) == 6
        kept.append(kept_energy(dense, model, [record.target for record in plan.changes]))
    assert kept[1] > kept[0]


@pytest.mark.parametrize("calibrated", [False, True])
def test_an_order_in_blocks_is_left_alone(calibrated: bool) -> None:
    model, x = gated(), inputs()
    calibration = Calibration([{"x": x}]) if calibrated else None
    with torch.no_grad():
        for layer in (model.gate, model.up):
            layer.weight[:16, 8:] = 0
            layer.weight[16:, :8] = 0
        model.down.weight[:, 16:] = 0
    weight = model.scale.weight.clone()
    _, plan = sparsified(model, x, Context(calibration=calibration))
    assert not any("reordered" in record.summary for record in plan.changes)
    assert torch.equal(model.scale.weight, weight)


def output_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Return what a module inside a model computes."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2]))
    model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("target", ["first", "gate", "down"])
def test_calibrated_blocks_err_as_predicted_and_less_than_the_largest(target: str) -> None:
    """Of one layer, with all others as they are, reordered units included."""
    x = inputs()
    others = tuple(n for n in ("first", "gate", "up", "down") if n != target)
    errors = []
    for calibration in (None, Calibration([{"x": x[:40]}, {"x": x[40:]}])):
        model = gated()
        dense = copy.deepcopy(model)
        context = Context(calibration=calibration, ignore=others)
        _, plan = sparsified(model, x, context, replace(SMALL, damping=1e-6))
        (record,) = plan.changes
        expected, actual = dense(x), model(x)
        if target != "gate":  # whose outputs are in another order: what they do is compared
            expected, actual = (output_of(part, target, x) for part in (dense, model))
        scale = expected - expected.mean(0)
        errors.append(((actual - expected).norm() / scale.norm()).item())
        assert (record.predicted_error is None) is (calibration is None)
    assert errors[1] < errors[0]
    if target != "gate":
        # Predicted on rows weighed by what the outputs lose, observed on all alike.
        assert record.predicted_error == pytest.approx(errors[1], rel=0.25)


@pytest.mark.parametrize("budget", [0.9, 0.7])
def test_the_budget_is_met_by_the_whole_program(budget: float) -> None:
    program = capture(gated(), inputs())
    before = total_cost(program).flops
    proposal = SMALL.propose(program, Context(budget=budget))
    saved = sum(c.before.flops - c.after.flops for c in proposal.candidates)
    plan = PassManager(passes=(SMALL,), context=Context(budget=budget)).run(program)
    assert total_cost(program).flops <= budget * before
    assert total_cost(program).flops == before - saved
    assert plan.totals is not None
    removed = sum(r.before.parameters - r.after.parameters for r in plan.changes)
    assert plan.totals.after.parameters == plan.totals.before.parameters - removed
    stored = sum(parameter.numel() for parameter in program.model.parameters())
    assert plan.totals.after.parameters == stored


def test_operations_are_counted_by_kept_blocks_forward_and_backward() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()).append(
        nn.Linear(16, 2)
    )
    program, _ = sparsified(model, torch.randn(10, 16), Context(training=True))
    head, layer = 2 * 10 * 16 * 2, 2 * 10 * 16 * 16 // 2
    facts = facts_of(program)
    assert facts.forward_flops == 2 * layer + head
    # Values of both layers, inputs of the second only; both of the head.
    assert facts.backward_flops == 3 * layer + 2 * head
    model.get_submodule("0").requires_grad_(False)
    frozen = facts_of(capture(model, torch.randn(10, 16)))
    assert frozen.forward_flops == 2 * layer + head
    assert frozen.backward_flops == layer + 2 * head


def test_units_of_a_sparse_layer_are_never_pruned() -> None:
    program, _ = sparsified(gated(), inputs(), Context(ignore=("up", "down", "first")))
    for current in (program, capture(program.model, inputs())):
        (group,) = (g for g in axes_of(current).groups() if g.size == 32)
        assert not group.prunable
        assert any("has no axis rule" in reason for reason in group.reasons)


class Shared(nn.Module):
    """A layer used twice, a hooked one, a tied head and one of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 12)
        self.twice = nn.Linear(12, 12)
        self.hooked = nn.Linear(12, 12)
        self.odd = nn.Linear(12, 7)
        self.tied = nn.Linear(12, 32, bias=False)
        self.tied.weight = self.embedding.weight
        self.back = nn.Linear(32, 12)
        self.head = nn.Linear(12, 5)
        self.hooked.register_forward_hook(lambda module, args, output: None)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(self.embedding(tokens))))
        x = self.hooked(x) * self.odd(x).sum(-1, keepdim=True)
        result: Tensor = torch.sigmoid(self.head(self.back(self.tied(x)) + x)).float()
        return result


def test_what_stays_dense_has_a_reason() -> None:
    program = capture(Shared(), torch.randint(32, (2, 6)))
    step = SparsifyBlocks(block_out=4, block_in=4)
    proposal = step.propose(program, Context(ignore=("back",)))
    assert {miss.target: miss.reason for miss in proposal.misses} == {
        "hooked": "hooked has hooks, which expect the module as it is",
        "odd": "blocks of 4 do not divide the output size 7",
        "tied": "tied.weight is tied to embedding.weight",
        "back": "ignored by the pattern 'back'",
        "head": "its output is a result of the model, and output heads stay dense",
    }
    assert [candidate.change.target for candidate in proposal.candidates] == ["twice"]


def test_a_layer_that_is_called_twice_is_counted_and_replaced_twice() -> None:
    model, tokens = Shared().eval(), torch.randint(32, (2, 6))
    step = SparsifyBlocks(block_out=4, block_in=4)
    context = Context(calibration=Calibration([{"tokens": tokens}]), ignore=("back", "odd"))
    program, plan = sparsified(model, tokens, context, step)
    (record,) = plan.changes
    assert record.before.flops == 2 * 2 * 12 * 12 * 12
    assert record.after.flops == record.before.flops // 3  # one of three column groups
    assert record.predicted_error is not None
    assert relative_error(program(tokens), model(tokens)) <= rounding_bound(program)


def test_a_kept_share_per_layer_overrides_the_budget() -> None:
    program = capture(gated(), inputs())
    keep = {"first": 1.0, "gate": 0.25, "up": 0.75, "down": 1.0}
    proposal = SMALL.propose(program, Context(budget=0.6, keep=keep))
    blocks = {c.change.target: c.change.details["blocks"] for c in proposal.candidates}
    assert blocks == {"gate": 4, "up": 12}
    assert ("first", "all of it fits the budget") in {(m.target, m.reason) for m in proposal.misses}


def test_a_measured_loss_is_refused_with_the_number() -> None:
    program = capture(gated(), inputs(2))
    proposal = SMALL.propose(program, Context(costs=SlowerCosts(budget_s=0.01)))
    assert proposal.candidates == ()
    (miss,) = (miss for miss in proposal.misses if miss.target == "first")
    assert miss.reason.startswith("8-row blocks measured 0.")
    assert miss.reason.endswith("x, kept dense")


@pytest.mark.parametrize("training", [False, True])
def test_a_measured_gain_is_kept_with_both_times(training: bool) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 2))
    program = capture(model, torch.randn(128, 1024))
    context = Context(costs=Costs(budget_s=0.1), training=training)
    state = torch.random.get_rng_state()
    (candidate,) = SparsifyBlocks(density=0.125).propose(program, context).candidates
    assert torch.equal(torch.random.get_rng_state(), state)
    assert candidate.before.latency_ms is not None
    assert candidate.after.latency_ms is not None
    assert candidate.after.latency_ms < candidate.before.latency_ms


def test_trained_and_frozen_parameters_stay_so() -> None:
    model = gated()
    program, _ = sparsified(model, inputs(), Context(training=True))
    found = observe(program, training=True, gradients=True).gradients
    assert set(found) == {name for name, _ in model.named_parameters()}
    frozen = gated().requires_grad_(False)
    sparsified(frozen, inputs(), Context())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_undoing_gives_layers_of_their_own_class_and_function() -> None:
    case = find_case("gpt2")
    model = without_dropout(case.build())
    kinds = {name: type(module) for name, module in model.named_modules()}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    program, plan = sparsified(model, case.inputs(*EXAMPLE), Context())
    assert len(plan.changes) == 8
    expected = observe(program, training=False, gradients=False).outputs
    for record in reversed(plan.changes):
        SMALL.restore(model, record.change)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    actual = observe(capture(model, case.inputs(*EXAMPLE)), training=False, gradients=False).outputs
    for new, old in zip(actual, expected, strict=True):
        assert relative_error(new, old) <= rounding_bound(program)


def test_saved_models_load_with_equal_outputs_and_densify(tmp_path: Path) -> None:
    x = inputs()
    model = graphopt.optimize(gated(), x, recipe=[SMALL], measure=False).eval()
    graphopt.save(model, tmp_path / "saved", factory=f"{__name__}:gated")
    loaded = graphopt.load(tmp_path / "saved", base=gated).eval()
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(sparse_layer(loaded, "gate").rows, sparse_layer(model, "gate").rows)
    dense = graphopt.densify(loaded)
    assert type(dense.get_submodule("gate")) is nn.Linear
    assert relative_error(dense(x), model(x)) <= rounding_bound(capture(dense, x))
    assert "sparsify-blocks" in str(graphopt.report(model))


def test_the_command_line_optimizes_by_a_recipe_file(tmp_path: Path) -> None:
    case = find_case("bert-classifier")
    model: Any = without_dropout(case.build())
    model.save_pretrained(tmp_path / "dense")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "passes: [{name: sparsify-blocks, options: {density: 0.5}}]", encoding="utf-8"
    )
    arguments = [
        *("optimize", tmp_path / "dense", "-o", tmp_path / "sparse", "--recipe", recipe),
        *("--no-measure", "--ignore", "attention", "--batch", "2", "--length", "8"),
    ]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    report = CliRunner().invoke(app, ["report", str(tmp_path / "sparse"), "--json"])
    assert "units reordered" in report.stdout
    loaded = graphopt.load(tmp_path / "sparse")
    sparse = [module for module in loaded.modules() if isinstance(module, BlockSparseLinear)]
    assert [layer.density for layer in sparse] == [0.5] * 5
    assert type(loaded).__mro__[1] is type(model)


@pytest.mark.parametrize(
    "options",
    [{"density": 0.0}, {"density": 1.5}, {"damping": 0.0}, {"block_out": -1}, {"scores": "best"}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    program = capture(gated(), inputs())
    with pytest.raises(PreconditionError, match=r"sparsify-blocks (needs 0 < density|scores by)"):
        SparsifyBlocks(**options).requires(program, Context())
    with pytest.raises(PreconditionError, match="needs calibration data"):
        SparsifyBlocks(scores="obs").requires(program, Context())


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ({"blocks": 0}, "blocks: Input should be greater than or equal to 1"),
        ({"blocks": 7}, "gate cannot keep 7 blocks of 8x4"),
        ({"blocks": 16}, "gate cannot keep 16 blocks of 8x4"),
        ({"block_out": 5}, "gate cannot keep 8 blocks of 5x4"),
        ({"block_in": 3}, "gate cannot keep 8 blocks of 8x3"),
        ({"block_in": True}, "block_in: Input should be a valid integer"),
        ({"in_features": 24}, "gate must be a linear layer 24 -> 32"),
        ({"bias": False}, "gate must be a linear layer"),
        ({"units": [{"group": 3, "layers": {}}]}, "units.0.group: Input should be a valid string"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(details: dict[str, Any], text: str) -> None:
    program = capture(gated(), inputs())
    candidates = SMALL.propose(program, Context()).candidates
    (change,) = (c.change for c in candidates if c.change.target == "gate")
    wrong = replace(change, details={**change.details, **details})
    with pytest.raises(PlanError, match=text):
        SMALL.apply(program, wrong)
    with pytest.raises(PlanError, match="scale must be a linear layer"):
        SMALL.apply(program, replace(change, target="scale"))
    with pytest.raises(PlanError, match="gate is not the sparse layer"):
        SMALL.restore(program.model, change)
