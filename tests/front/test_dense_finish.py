"""Block-sparse layers become dense in the middle of a training, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import TrainingError
from graphopt.kernels import BlockLayout, BlockSparseLinear
from graphopt.passes.facts import total_cost
from graphopt.passes.plan import cost_record
from graphopt.passes.registry import pass_named
from graphopt.runtime import installation_of
from graphopt.training import BlockTopology, DensitySchedule, densify_in_place

WIDTH = 32


def feed_forward() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH), nn.Tanh())


def hand_built() -> nn.Module:
    model = feed_forward()
    for index in (0, 2):
        dense = model[index]
        assert isinstance(dense, nn.Linear)
        model[index] = BlockSparseLinear.from_dense(dense, 0.5, block_out=16, block_in=8)
    return model


def optimized() -> nn.Module:
    sparsify = pass_named("sparsify-blocks", block_out=16, block_in=8)
    model = nn.Sequential(feed_forward(), nn.LayerNorm(WIDTH), feed_forward())
    example = torch.randn(4, WIDTH)
    return graphopt.optimize(model, example, recipe=[sparsify], measure=False, inplace=True)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    optimizer.step()


def sparse_count(model: nn.Module) -> int:
    return sum(isinstance(module, BlockSparseLinear) for module in model.modules())


@pytest.mark.parametrize("build", [hand_built, optimized])
def test_outputs_optimizer_and_training_go_on(build: Callable[[], nn.Module]) -> None:
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        train_step(model, optimizer, step)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}
    assert layers
    states = {name: dict(optimizer.state[layer.values]) for name, layer in layers.items()}
    gradients = {name: layer.values.grad for name, layer in layers.items()}
    x = torch.randn(4, WIDTH)
    before = model(x)
    assert densify_in_place(model, optimizer) == tuple(layers)
    # Sums of 64 terms in another order, twice in a row, behind normalisation and tanh.
    torch.testing.assert_close(model(x), before, rtol=0, atol=64 * 8 * 2**-23)
    for name, layer in layers.items():
        dense = model.get_submodule(name)
        assert type(dense) is nn.Linear
        assert torch.equal(dense.weight, layer.weight)
        assert dense.bias is layer.bias
        assert layer.values not in optimizer.state
        state = optimizer.state[dense.weight]
        assert state.keys() == states[name].keys()
        assert torch.equal(state["step"], states[name]["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], layer.layout.unpack(states[name][key]))
        gradient = gradients[name]
        assert gradient is not None
        assert dense.weight.grad is not None
        assert torch.equal(dense.weight.grad, layer.layout.unpack(gradient))
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    weights = [model.get_parameter(f"{name}.weight") for name in layers]
    missing = [weight == 0 for weight in weights]
    train_step(model, optimizer, 3)
    assert all(bool(weight[zeros].any()) for weight, zeros in zip(weights, missing, strict=True))


def saved_and_loaded(model: nn.Module, directory: Path) -> nn.Module:
    graphopt.save(model, directory)
    return graphopt.load(directory)


def test_an_optimized_model_tells_what_it_is_now(tmp_path: Path) -> None:
    model = optimized()
    earlier = copy.deepcopy(model)
    count = sparse_count(model)
    assert count
    densify_in_place(model)
    found = installation_of(model)
    assert found is not None
    assert found.program is not None
    assert not [c for c in found.plan.changes if c.pass_name == "sparsify-blocks"]
    assert found.plan.totals is not None
    assert found.plan.totals.after == found.plan.totals.before
    x = torch.randn(4, WIDTH)
    loaded = saved_and_loaded(model, tmp_path / "dense")
    assert sparse_count(loaded) == 0
    assert torch.equal(loaded(x), model.eval()(x))
    assert torch.equal(graphopt.densify(model)(x), model(x))

    # The copy is as the model was.
    assert sparse_count(earlier) == count
    loaded = saved_and_loaded(earlier, tmp_path / "sparse")
    assert sparse_count(loaded) == count
    assert torch.equal(loaded(x), earlier.eval()(x))


def test_moved_and_fewer_blocks_are_saved(tmp_path: Path) -> None:
    model = optimized().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = DensitySchedule(
        model, optimizer, final_density=0.3, total_steps=6, stop=0.5, interval=1
    )
    topology = BlockTopology(model, optimizer, total_steps=6, interval=1, drop_fraction=0.9)
    earlier = copy.deepcopy(model)
    moved = 0
    for step in range(6):
        train_step(model, optimizer, step)
        schedule.step()
        moved += topology.step()
    assert moved
    found = installation_of(model)
    assert found is not None
    assert found.plan.totals is not None
    before, after = found.plan.totals.before, found.plan.totals.after
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert after.parameters == counted
    assert after.size_bytes == 4 * counted
    for change in found.plan.changes:
        layer = model.get_submodule(change.target)
        assert isinstance(layer, BlockSparseLinear)
        assert change.details["blocks"] == layer.layout.blocks
        assert change.summary.endswith(f", then {layer.layout.blocks} in training")
        assert layer.density == pytest.approx(0.3, abs=0.06)
        assert change.after.flops == round(change.before.flops * layer.density)
    assert after.flops < before.flops
    assert found.program is not None
    assert cost_record(total_cost(found.program)) == after
    kept = installation_of(earlier)
    assert kept is not None
    assert kept.program is not None
    assert kept.plan.totals is not None
    assert cost_record(total_cost(kept.program)) == kept.plan.totals.after
    x = torch.randn(4, WIDTH)
    loaded = saved_and_loaded(model, tmp_path / "model")
    assert torch.equal(loaded(x), model.eval()(x))
    assert torch.equal(saved_and_loaded(earlier, tmp_path / "earlier")(x), earlier.eval()(x))


def test_frozen_layers_and_shared_ones_become_dense_too() -> None:
    layer = BlockSparseLinear(BlockLayout.from_scores(torch.rand(4, 4), 0.5, 8, 8), bias=False)
    layer.values.requires_grad_(False)
    model = nn.ModuleDict({"first": layer, "second": layer})
    assert densify_in_place(model) == ("first",)
    dense = model["first"]
    assert isinstance(dense, nn.Linear)
    assert model["second"] is dense
    assert dense.bias is None
    assert not dense.weight.requires_grad


class RowState(torch.optim.SGD):
    """Keeps a number per block."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step(closure)
        values = self.param_groups[0]["params"][0]
        self.state[values]["block_scale"] = torch.zeros(len(values), 1)


def test_what_cannot_be_carried_is_refused_before_anything_changes() -> None:
    dense = feed_forward()
    with pytest.raises(TrainingError, match="got Sequential; there is nothing"):
        densify_in_place(dense)
    model = hand_built()
    with pytest.raises(TrainingError, match="does not hold the values of '0'"):
        densify_in_place(model, torch.optim.SGD(dense.parameters(), lr=0.1))
    optimizer = RowState(model.parameters(), lr=0.1)
    train_step(model, optimizer, 0)
    with pytest.raises(TrainingError, match=r"got block_scale \[8, 1\], which a dense weight"):
        densify_in_place(model, optimizer)
    wrapped = graphopt.optimize(
        hand_built(), torch.randn(4, WIDTH), recipe=["fuse-projections"], measure=False
    )
    with pytest.raises(TrainingError, match=r"got \['0', '2'\], which were block-sparse before"):
        densify_in_place(wrapped)
    assert sparse_count(model) == sparse_count(wrapped) == 2


def test_a_watched_step_may_end_dense() -> None:
    model = hand_built()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = BlockTopology(model, optimizer, total_steps=10, interval=1)
    densify_in_place(model, optimizer)
    train_step(model, optimizer, 0)
    assert topology.step() == 0


class Turned(nn.Module):
    """A linear layer that stores its weight as [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(WIDTH, 64) / 8)
        self.shift = nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.shift, x, self.kernel)


def test_a_layer_of_another_class_comes_back_as_that_class() -> None:
    model = graphopt.optimize(
        nn.Sequential(Turned(), nn.Tanh(), nn.Linear(64, WIDTH)).train(),
        torch.randn(4, WIDTH),
        recipe=[pass_named("sparsify-blocks", block_out=16, block_in=8)],
        measure=False,
    )
    layer = model.get_submodule("0")
    assert isinstance(layer, BlockSparseLinear)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_step(model, optimizer, 0)
    momentum = optimizer.state[layer.values]["momentum_buffer"]
    densify_in_place(model, optimizer)
    dense = model.get_submodule("0")
    assert isinstance(dense, Turned)
    assert dense.shift is layer.bias
    assert torch.equal(dense.kernel, layer.weight.t())
    moved = optimizer.state[dense.kernel]["momentum_buffer"]
    assert torch.equal(moved, layer.layout.unpack(momentum).t())
    train_step(model, optimizer, 1)
