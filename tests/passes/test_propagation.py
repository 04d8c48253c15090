"""`refresh` recomputes what changed, keeps the rest, and proves that shapes fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from zoo import EXAMPLE, find_case

from graphopt import Program, capture
from graphopt.errors import VerificationError
from graphopt.passes.program import shape_of
from graphopt.passes.propagation import refresh


def captured(name: str) -> Program:
    case = find_case(name)
    inputs = case.inputs(*EXAMPLE)
    return capture(case.build(), inputs)


def values(program: Program) -> dict[str, object]:
    return {n.name: n.meta["val"] for n in program.graph.nodes if n.op != "output"}


def shapes(program: Program) -> dict[str, str]:
    return {name: str(getattr(value, "shape", value)) for name, value in values(program).items()}


@pytest.mark.parametrize("name", ["bert", "lstm", "cnn", "mixtral"])
def test_an_unchanged_program_keeps_every_value(name: str) -> None:
    program = captured(name)
    before = values(program)
    refresh(program)
    assert all(value is before[key] for key, value in values(program).items())


@pytest.mark.parametrize("name", ["bert", "lstm", "cnn", "transformer-encoder"])
def test_recomputed_values_have_the_captured_shapes(name: str) -> None:
    program = captured(name)
    before = shapes(program)
    for node in program.graph.nodes:
        node.meta.pop("computed_from", None)
        if node.op == "call_function":
            node.meta["val"] = None
    refresh(program)
    assert shapes(program) == before


def test_only_what_a_resized_layer_feeds_is_recomputed() -> None:
    program = captured("shared-block")
    block = program.module("block")
    block.up, block.down = nn.Linear(32, 40), nn.Linear(40, 32)
    before = values(program)
    refresh(program)
    for call in program.calls("block.up"):
        assert shape_of(call) == (*EXAMPLE, 40)
        body = call.meta["body"]
        weight = next(n for n in body.nodes if n.op == "get_attr" and "weight" in n.target)
        assert weight.target == "block.up.weight"
        assert weight.meta["val"].shape == (40, 32)
    kept = {
        node.name for node in program.graph.nodes if before.get(node.name) is node.meta.get("val")
    }
    assert program.calls("block.norm")[0].name in kept
    assert program.calls("block.up")[0].name not in kept


def test_an_edited_constant_is_recomputed_on_a_model_with_an_lstm() -> None:
    program = captured("lstm")
    embedding = program.calls("embedding")[0]
    with program.graph.inserting_after(embedding):
        doubled = program.graph.call_function(torch.ops.aten.mul.Tensor, (embedding, 2.0))
    doubled.meta = {"modules": ("",), "calls": ("",)}
    embedding.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    refresh(program)
    assert shape_of(doubled) == (*EXAMPLE, 32)
    program.module("head").weight = nn.Parameter(torch.zeros(5, 32))
    program.module("head").bias = nn.Parameter(torch.zeros(5))
    refresh(program)
    assert shape_of(program.calls("head")[0]) == (EXAMPLE[0], 5)


def test_equal_operations_are_computed_once() -> None:
    program = captured("bert")
    source = next(node for node in program.graph.nodes if node.op == "call_module")
    factors = (2.0, 2.0, 3.0)
    with program.graph.inserting_after(source):
        products = [
            program.graph.call_function(torch.ops.aten.mul.Tensor, (source, factor))
            for factor in factors
        ]
    for product in products:
        product.meta = {"modules": ("",), "calls": ("",)}
    refresh(program)
    first, second, third = (product.meta["val"] for product in products)
    assert first is second
    assert first is not third


def test_a_plain_attribute_of_a_layer_counts_as_a_change() -> None:
    program = captured("cnn")
    stem = program.module("stem")
    assert isinstance(stem, nn.Conv2d)
    stem.stride = (1, 1)
    refresh(program)
    assert shape_of(program.calls("stem")[0]) == (EXAMPLE[0], 16, 32, 32)
    assert shape_of(program.calls("project_norm")[0]) == (EXAMPLE[0], 16, 32, 32)


class Applied(nn.Module):
    """A layer whose function is an attribute."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def test_equal_layers_share_a_trace_under_names_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()).eval()
    program = capture(model, torch.randn(4, 8))
    model[0], model[2] = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    model[1], model[3] = Applied(torch.relu), Applied(torch.tanh)
    refresh(program)
    bodies = [program.calls(str(place))[0].meta["body"] for place in range(4)]
    read = [[n.target for n in body.nodes if n.op == "get_attr"] for body in bodies]
    assert read == [["0.weight"], [], ["2.weight"], []]
    done = [[n.target for n in body.nodes if n.op == "call_function"] for body in bodies]
    assert done[0] == done[2]
    assert done[1] == [torch.ops.aten.relu.default]
    assert done[3] == [torch.ops.aten.tanh.default]
    assert program.calls("0")[0].meta["val"] is program.calls("2")[0].meta["val"]


def test_a_misfit_is_named() -> None:
    program = captured("shared-block")
    program.module("block").up = nn.Linear(32, 40)
    with pytest.raises(VerificationError, match=r"block_down.*block\.down.*does not fit"):
        refresh(program)


def test_works_on_meta_parameters() -> None:
    case = find_case("gpt2")
    with torch.device("meta"):
        model = case.build()
    program = capture(model, case.inputs(*EXAMPLE))
    with torch.device("meta"):
        program.model.lm_head = nn.Linear(32, 7, bias=False)
    refresh(program)
    assert shape_of(program.calls("lm_head")[0]) == (*EXAMPLE, 7)


def test_a_program_without_tensors_is_refused() -> None:
    program = captured("sequential")
    for placeholder in program.placeholders:
        placeholder.meta["val"] = 1
    assert isinstance(program.graph, fx.Graph)
    with pytest.raises(VerificationError, match="without tensor inputs"):
        refresh(program)
