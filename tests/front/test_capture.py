"""A captured program is the model: the same bits, at other sizes, in every mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import CASES, EXAMPLE, Case, find_case, without_dropout
from zoo_modules import RecurrentBlock

from graphopt import Program, capture
from graphopt.errors import CaptureError, InputError
from graphopt.passes.calls import canonical_arguments
from graphopt.passes.program import eager_forward
from graphopt.passes.structure import flatten
from graphopt.passes.verifier import preserved, relative_error, rounding_bound

SIZES = ((1, 11), (4, 9), (5, 33))
"""Batch and sequence sizes other than those of the capture."""
LABELLED = ("bert-classifier", "gpt2-padded", "t5", "vit")  # one of every kind of loss
CALLS = [(case, False) for case in CASES] + [(find_case(name), True) for name in LABELLED]


@dataclass(frozen=True)
class Captured:
    case: Case
    labels: bool
    model: nn.Module
    program: Program

    def call(self, batch: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.case.call(batch, length, labels=self.labels)

    def runs_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Say whether the program runs its graph on this call in the model's mode."""
        tensors, _ = flatten(canonical_arguments(self.program.signature, args, kwargs))
        return self.program.accepts(tensors)


@pytest.fixture(
    scope="module",
    params=CALLS,
    ids=[f"{case.name}{'-labels' if labels else ''}" for case, labels in CALLS],
)
def captured(request: pytest.FixtureRequest) -> Captured:
    case, labels = request.param
    model = without_dropout(case.build())
    args, kwargs = case.call(*EXAMPLE, labels=labels)
    return Captured(case, labels, model, capture(model, kwargs or args))


def assert_same_result(actual: Any, expected: Any) -> None:
    """Compare types, constants and every tensor to the last bit; NaN equals NaN."""
    tensors, structure = flatten(actual)
    references, expected_structure = flatten(expected)
    assert structure == expected_structure
    for value, reference in zip(tensors, references, strict=True):
        assert value.dtype == reference.dtype
        assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(reference))


def gradients(model: nn.Module, result: Any) -> dict[str, Tensor | None]:
    outputs = [value for value in flatten(result)[0] if value.requires_grad]
    trained = dict(model.named_parameters())
    loss = torch.stack([value.square().mean() for value in outputs]).sum()
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return dict(zip(trained, found, strict=True))


def test_evaluation_is_equal_at_other_sizes(captured: Captured) -> None:
    model = captured.model.eval()
    for batch, length in SIZES:
        args, kwargs = captured.call(batch, length)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert_same_result(captured.program(*args, **kwargs), model(*args, **kwargs))


def test_training_gradients_are_equal_at_other_sizes(captured: Captured) -> None:
    model = captured.model.train()
    for batch, length in SIZES[:2]:
        args, kwargs = captured.call(batch, length)
        with preserved(model):
            eager = model(*args, **kwargs)
            expected = gradients(model, eager)
        with preserved(model):
            graph = captured.program(*args, **kwargs)
            found = gradients(model, graph)
        assert_same_result(graph, eager)
        # Over a mask of ones eager attention takes another kernel for grouped heads than over the
        # captured, padded one: equal outputs, gradients up to rounding.
        bound = (
            rounding_bound(captured.program)
            if captured.case.name == "llama-padded" and batch == 1
            else 0.0
        )
        for name, reference in expected.items():
            gradient = found[name]
            if reference is None or gradient is None:
                assert reference is gradient, name
            else:
                assert relative_error(gradient, reference) <= bound, name


def test_the_graph_runs_at_other_sizes(captured: Captured) -> None:
    captured.model.eval()
    for batch, length in SIZES:
        if captured.case.name != "lstm" or length == EXAMPLE[1]:
            assert captured.runs_graph(*captured.call(batch, length))


def test_batch_is_dynamic_and_length_too_but_for_the_lstm(captured: Captured) -> None:
    for placeholder in captured.program.placeholders:
        assert 0 in captured.program.dynamic_dimensions()[placeholder.name]
    static = "dimension 1 of tokens is static at 9"
    assert (static in captured.program.notes) == (captured.case.name == "lstm")


def test_leaf_modules_are_called_as_modules(captured: Captured) -> None:
    called = {str(n.target) for n in captured.program.graph.nodes if n.op == "call_module"}
    layers = {name for name, m in captured.model.named_modules() if isinstance(m, nn.Linear)}
    attention = {name for name in layers if name.endswith("self_attn.out_proj")}
    if not captured.case.name.startswith("transformer-encoder"):
        attention = set()  # only nn.MultiheadAttention reads its projection's weight itself
    assert layers - attention <= called


@pytest.mark.parametrize("name", ["bert", "gpt2", "swin", "cnn"])
def test_dropout_draws_the_same_numbers_as_eager(name: str) -> None:
    case = find_case(name)
    model = case.build()
    program = capture(model, case.inputs(*EXAMPLE))
    assert not program.notes
    model.train()
    args, kwargs = case.call(4, 16)
    with preserved(model):
        expected = model(*args, **kwargs)
    with preserved(model):
        assert_same_result(program(*args, **kwargs), expected)
    with preserved(model):
        torch.manual_seed(1)
        other, _ = flatten(program(*args, **kwargs))
    assert not torch.equal(other[0], flatten(expected)[0][0])


def test_program_prints_as_code_with_sizes() -> None:
    case = find_case("bert-classifier")
    text = str(capture(case.build(), case.inputs(*EXAMPLE)))
    assert text.startswith("# BertForSequenceClassification\n#   input_ids: torch.int64 [s")
    assert "self.classifier(" in text
    assert ".attention.self.query(" in text


def test_one_example_row_gives_a_dynamic_batch() -> None:
    case = find_case("bert")
    model = case.build().eval()
    program = capture(model, case.inputs(1, 16))
    args, kwargs = case.call(4, 7)
    assert program.accepts(flatten(kwargs)[0])
    assert_same_result(program(*args, **kwargs), model(*args, **kwargs))


def test_one_example_token_gives_a_static_length_with_a_note() -> None:
    case = find_case("bert")
    program = capture(case.build(), case.inputs(2, 1))
    assert "dimension 1 of input_ids is static at 1" in program.notes


def test_length_equal_to_width_stays_dynamic() -> None:
    case = find_case("shared-block")
    model = case.build().eval()
    program = capture(model, case.inputs(2, 32))
    args, _ = case.call(3, 7)
    assert program.accepts(args)
    assert_same_result(program(*args), model(*args))


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_training_updates_running_statistics_like_eager(name: str) -> None:
    case = find_case(name)
    eager, model = without_dropout(case.build()), without_dropout(case.build())
    before = {key: value.clone() for key, value in model.named_buffers()}
    program = capture(model, case.inputs(*EXAMPLE))
    assert all(torch.equal(model.get_buffer(key), value) for key, value in before.items())
    args, kwargs = case.call(4, 16)
    eager.train()(*args, **kwargs)
    model.train()
    assert program.accepts(flatten(canonical_arguments(program.signature, args, kwargs))[0])
    program(*args, **kwargs)
    after = dict(model.named_buffers())
    assert all(torch.equal(after[key], value) for key, value in eager.named_buffers())
    assert any(not torch.equal(after[key], value) for key, value in before.items())


def test_shared_block_is_called_three_times() -> None:
    case = find_case("shared-block")
    program = capture(case.build(), case.inputs(*EXAMPLE))
    assert isinstance(program.model, RecurrentBlock)
    assert [len(program.calls(f"block.{name}")) for name in ("norm", "up", "down")] == [3, 3, 3]
    assert [node.meta["calls"][-1] for node in program.calls("block.up")] == [
        "block.up",
        "block.up@1",
        "block.up@2",
    ]


def test_capture_leaves_modes_and_random_numbers_alone() -> None:
    case = find_case("cnn")
    model = case.build()
    model.get_submodule("stem_norm").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    capture(model, case.inputs(*EXAMPLE))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_meta_model_is_captured_without_memory() -> None:
    case = find_case("llama")
    with torch.device("meta"):
        model = case.build()
    program = capture(model, case.inputs(*EXAMPLE))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(program.calls("lm_head")) == 1
    assert program.dynamic_dimensions()["input_ids"].keys() == {0, 1}


def test_another_flag_runs_the_eager_forward() -> None:
    case = find_case("flags")
    model = case.build().eval()
    program = capture(model, case.inputs(*EXAMPLE))
    inputs = dict(case.call(4, 7)[1])
    assert_same_result(program(inputs.pop("features"), **inputs), model(**case.call(4, 7)[1]))
    for change in ({"normalize": False}, {"scale": 3.0}, {"bias": torch.ones(64)}):
        call = case.call(4, 7)[1] | change
        assert_same_result(program(**call), model(**call))


def test_traced_numbers_in_results_follow_the_call() -> None:
    case = find_case("gemma3")
    model = case.build().eval()
    program = capture(model, case.inputs(*EXAMPLE))
    assert program.accepts([case.call(1, 21)[1]["input_ids"]])
    result = program(**case.call(1, 21)[1])
    assert result.past_key_values.get_seq_length() == 21
    assert eager_forward(model)(**case.call(1, 21)[1]).past_key_values.get_seq_length() == 21


class Branching(nn.Module):
    """Takes one of two layers, depending on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, features: Tensor) -> Tensor:
        layer = self.positive if features.sum() > 0 else self.negative
        result: Tensor = layer(features)
        return result


def test_data_dependent_branch_is_refused_with_a_reason() -> None:
    model = Branching()
    with pytest.raises(CaptureError, match=r"cannot trace Branching.*data-dependent"):
        capture(model, torch.randn(2, 4))
    assert model.training
    assert not model._forward_hooks
    assert not model.positive._forward_hooks


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="do not fit forward"):
        capture(Branching(), (torch.randn(2, 4), 1))
    with pytest.raises(InputError, match="must be a tensor, a tuple or a dict, got int"):
        capture(Branching(), 3)


class NestedResult(nn.Module):
    """Three results in two containers, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, features: Tensor, *, scales: dict[str, Tensor]) -> tuple[Any, ...]:
        hidden = self.layer(features) * scales["first"]
        return hidden, {"again": [hidden, None], "length": features.shape[1], "name": "x"}


def test_nested_arguments_and_results_keep_their_form() -> None:
    model = NestedResult().eval()
    program = capture(model, {"features": torch.randn(2, 6, 4), "scales": {"first": torch.ones(4)}})
    call = {"features": torch.randn(3, 9, 4), "scales": {"first": torch.full((4,), 2.0)}}
    assert program.accepts(flatten(call)[0])
    assert_same_result(program(**call), model(**call))
    assert program(**call)[1]["length"] == 9


class OneRow(nn.Module):
    """Takes a batch of one row only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[0] != 1:
            raise ValueError("one row at a time")
        result: Tensor = self.layer(features)
        return result


def test_a_model_for_one_row_is_captured_with_one() -> None:
    model = OneRow().eval()
    program = capture(model, torch.randn(1, 4))
    assert program.notes == ("dimension 0 of features is static at 1",)
    features = torch.randn(1, 4)
    assert program.accepts([features])
    assert torch.equal(program(features), model(features))


class Compacting(nn.Module):
    """Keeps the rows whose first feature is positive: nobody knows how many from shapes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        kept: Tensor = self.linear(x[x[:, 0] > 0])
        return kept


def test_shapes_that_depend_on_values_are_refused() -> None:
    with pytest.raises(CaptureError, match="depends on the values of the inputs"):
        capture(Compacting(), torch.randn(5, 4))
