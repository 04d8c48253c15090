"""Layers that are left out at first, and join as copies of those that trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import pytest
import torch
from residual_stack import TRAINING, Stack, X, blocks_of
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from zoo import EXAMPLE, find_case

import graphopt
from graphopt.capture import capture
from graphopt.kernels.depth_gate import DepthGate
from graphopt.kernels.gates import Gate
from graphopt.kernels.resolution_gate import ResolutionGate
from graphopt.passes.base import Context
from graphopt.passes.errors import ConfigError
from graphopt.passes.gates.grow_depth import GrowDepth
from graphopt.passes.gates.repeated_blocks import repeated_layers


def grown(model: nn.Module, step: GrowDepth | None = None) -> nn.Module:
    return graphopt.optimize(model, (X,), recipe=[step or GrowDepth()]).train()


def advance(model: nn.Module, progress: float) -> None:
    for module in model.modules():
        if isinstance(module, DepthGate):
            module.advance(0, progress)


def trained(model: nn.Module, progress: float, steps: int = 3) -> nn.Module:
    """Return the model after some steps at one progress."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    advance(model, progress)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


def reasons(model: nn.Module, context: Context = TRAINING, example: Tensor = X) -> list[str]:
    return [miss.reason for miss in GrowDepth().propose(capture(model, (example,)), context).misses]


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama"])
def test_a_layer_is_attention_and_feed_forward(name: str) -> None:
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE)
    found = repeated_layers(capture(case.build(), kwargs or args))
    assert [len(layer) for layer in found] == [2, 2]


def test_the_first_layers_train_alone_as_a_model_of_these() -> None:
    model = trained(grown(Stack(blocks=4)), 0.2)
    small = trained(without_tail(Stack(blocks=4), 1), 0.2)
    assert torch.equal(model(X), small(X))
    assert torch.equal(model.eval()(X), small.eval()(X))


def test_a_layer_joins_as_a_copy_and_trains_on() -> None:
    model = grown(Stack(blocks=4), GrowDepth(start=0.5, joins=0.5))
    first, second, *others = blocks_of(trained(model, 0.2))
    advance(model, 0.5)
    model(X)
    for block, donor in zip(others, (first, second), strict=True):
        for own, value in zip(block.parameters(), donor.parameters(), strict=True):
            assert torch.equal(own, value)
    last = blocks_of(trained(model, 0.6))[-1]
    assert not torch.equal(last.up.weight, second.up.weight)


def test_a_layer_that_is_left_out_has_no_gradient() -> None:
    model = grown(Stack(blocks=4))
    advance(model, 0.0)
    model(X).sum().backward()
    first, *others = blocks_of(model)
    assert all(parameter.grad is not None for parameter in first.parameters())
    assert all(p.grad is None for block in others for p in block.parameters())
    assert not any(p.any() for block in others for p in block.parameters())


def test_nothing_happens_before_progress_is_reported() -> None:
    model = grown(Stack(blocks=4))
    assert torch.equal(model(X), Stack(blocks=4)(X))


@pytest.mark.parametrize("saved_at", [0.2, 0.7])
def test_a_training_goes_on_from_a_checkpoint(saved_at: float, tmp_path: Path) -> None:
    model = trained(trained(grown(Stack(blocks=4)), 0.2), saved_at)
    graphopt.save(model, tmp_path / "saved")
    again = graphopt.load(tmp_path / "saved", base=Stack(blocks=4)).train()
    assert torch.equal(trained(again, 0.8)(X), trained(model, 0.8)(X))


def test_a_trained_model_is_not_touched_by_a_new_training() -> None:
    model = trained(trained(grown(Stack(blocks=4)), 0.2), 0.7)
    plain = copy.deepcopy(model)
    again = graphopt.optimize(Stack(blocks=4), (X,), recipe=[GrowDepth()]).train()
    again.load_state_dict(plain.state_dict())
    advance(again, 0.0)
    assert torch.equal(again(X), plain(X))


def test_a_copy_of_the_model_grows_by_itself() -> None:
    model = grown(Stack(blocks=4))
    before = copy.deepcopy(model.state_dict())
    trained(copy.deepcopy(model), 0.2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_trained_frozen_and_ignored_layers_are_refused() -> None:
    model = Stack(blocks=3)
    _, second, third = blocks_of(model)
    for parameter in second.parameters():
        nn.init.normal_(parameter)
    third.up.weight.requires_grad_(False)
    assert reasons(model) == [
        "its weights were trained: none of its parameters has the same value everywhere",
        "blocks.2.up.weight is not trained",
    ]
    assert reasons(Stack(blocks=2), Context(training=True, ignore=("blocks.1",))) == [
        "ignored by the pattern 'blocks.1'"
    ]


def test_tied_and_meta_layers_are_refused() -> None:
    model = Stack(blocks=2)
    first, second = blocks_of(model)
    second.up.weight = first.up.weight
    assert reasons(model) == ["its parameters are also read outside"]
    meta = reasons(Stack(blocks=2).to("meta"), example=X.to("meta"))
    assert meta == [
        "parameters on the meta device have no values that show whether they were trained"
    ]


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("functional", [True, False])
def test_a_block_with_running_statistics_is_refused(tracked: bool, functional: bool) -> None:
    model = Stack(blocks=2)
    for block in blocks_of(model):
        block.norm = cast(nn.LayerNorm, Statistics(tracked, functional))
    found = [reason.partition(" ")[2] for reason in reasons(model)]
    assert found == ["keeps running statistics, which a block that joins late would lack"] * tracked


def test_a_block_with_calls_that_are_no_operators_grows() -> None:
    model = Stack(blocks=3)
    for block in blocks_of(model):
        block.norm = cast(nn.LayerNorm, Halves())
    assert reasons(model) == []
    assert any(isinstance(module, DepthGate) for module in grown(model).modules())


class Halves(nn.Module):
    """Half of the width scaled, both taken out of a list with Python's `getitem`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split(4, -1)
        return torch.cat((first * self.weight, second), -1)


class Statistics(nn.Module):
    """A batch norm over the last axis of [batch, length, width], as a layer or as a function."""

    def __init__(self, tracked: bool, functional: bool) -> None:
        super().__init__()
        self.layer = nn.BatchNorm1d(8, track_running_stats=tracked)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(1, 2)
        if self.functional:
            mean, var = self.layer.running_mean, self.layer.running_var
            weight, bias = self.layer.weight, self.layer.bias
            turned = batch_norm(turned, mean, var, weight, bias, training=True)
        else:
            turned = self.layer(turned)
        return turned.transpose(1, 2)


@pytest.mark.parametrize(
    ("recipe", "growing"),
    [("ramp-resolution,grow-depth", False), ("train", False), ("grow-depth,ramp-resolution", True)],
)
def test_it_leaves_models_alone_whose_images_are_small_at_first(recipe: str, growing: bool) -> None:
    case = find_case("vit")
    model = graphopt.optimize(case.build(), case.call(*EXAMPLE)[1], recipe=recipe, measure=False)
    gates = {type(module) for module in model.modules() if isinstance(module, Gate)}
    assert gates == ({ResolutionGate, DepthGate} if growing else {ResolutionGate})


def test_a_model_without_repetition_is_refused() -> None:
    assert reasons(Stack(blocks=1)) == ["no residual block follows one like it"]


@pytest.mark.parametrize("options", [{"start": 0}, {"start": 1}, {"joins": 0}, {"joins": 1}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        GrowDepth(**options)


def without_tail(model: Stack, kept: int) -> Stack:
    model.blocks = model.blocks[:kept]
    return model.train()
