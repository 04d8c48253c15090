"""What all passes that replace linear layers share: fused ones are left, every class comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo import EXAMPLE, find_case, without_dropout

from graphopt.capture import capture
from graphopt.kernels import FusedLinear, LowRankLinear
from graphopt.passes.base import Context
from graphopt.passes.manager import PassManager
from graphopt.passes.program import Program
from graphopt.passes.registry import pass_named

REPLACING: dict[str, dict[str, Any]] = {
    "quantize-weights": {},
    "sparsify-blocks": {"block_out": 8, "block_in": 8},
    "factorize-low-rank": {"round_to": 4},
}


def program_of(name: str) -> Program:
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE)
    return capture(without_dropout(case.build()).eval(), kwargs or args)


@pytest.mark.parametrize("name", REPLACING)
def test_fused_layers_say_so_and_replaced_ones_are_not_fused(name: str) -> None:
    fuse, step = pass_named("fuse-projections"), pass_named(name, **REPLACING[name])
    for order in ((fuse, step), (step, fuse)):
        program = program_of("llama")
        plan = PassManager(passes=order, context=Context()).run(program)
        refused = {
            record.target
            for record in plan.misses
            if record.pass_name == name and "fused into one" in record.reason
        }
        fused = {
            layer
            for layer, module in program.model.named_modules()
            if isinstance(module, FusedLinear)
        }
        assert refused == fused
        assert bool(fused) == (order[0] is fuse)
        assert any(record.pass_name == name for record in plan.changes)


def test_layers_that_store_their_weight_turned_are_factorized_and_come_back() -> None:
    program = program_of("gpt2")
    model, step = program.model, pass_named("factorize-low-rank", round_to=4)
    dense = {name: type(module) for name, module in model.named_modules()}
    plan = PassManager(passes=(step,), context=Context()).run(program)
    targets = [record.target for record in plan.changes]
    assert {dense[target].__name__ for target in targets} == {"Conv1D"}
    for record in plan.changes:
        factors = model.get_submodule(record.target)
        assert isinstance(factors, LowRankLinear)
        weight, bias = factors.weight.detach(), factors.bias
        step.restore(model, record.change)
        again = model.get_submodule(record.target)
        assert type(again) is dense[record.target]
        torch.testing.assert_close(again.get_parameter("weight").t(), weight)
        assert again.get_parameter("bias") is bias
        assert not isinstance(again, nn.Linear)
