"""Folding BatchNorm: same function, structure, refusals, replay and undoing."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import find_case

from graphopt.capture import capture
from graphopt.passes.base import Change, Context, replace_module
from graphopt.passes.errors import PlanError
from graphopt.passes.exact.fold_batch_norm import FoldBatchNorm
from graphopt.passes.manager import PassManager, apply_plan
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.propagation import refresh
from graphopt.passes.verifier import observe, relative_error, rounding_bound

FOLD = FoldBatchNorm()

PAIRS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "conv1d": ([nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)], (3, 4, 9)),
    "conv2d": ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)], (3, 4, 9, 8)),
    "conv2d-grouped": ([nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)], (3, 4, 9, 8)),
    "conv2d-reflect": (
        [nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)],
        (3, 4, 9, 8),
    ),
    "conv3d": ([nn.Conv3d(4, 6, 2, bias=False), nn.BatchNorm3d(6)], (3, 4, 5, 4, 3)),
    "transposed": ([nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)], (3, 4, 5, 4)),
    "transposed-grouped": (
        [nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)],
        (3, 4, 5, 4),
    ),
    "linear": ([nn.Linear(4, 6), nn.BatchNorm1d(6)], (5, 4)),
    "no-affine": ([nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False)], (3, 4, 9, 8)),
    "cumulative": ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=None, eps=1e-3)], (3, 4, 9, 8)),
}


def with_statistics(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics, scales and shifts that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def folded(model: nn.Module, example: Any) -> tuple[Program, Plan]:
    program = capture(model, example)
    return program, PassManager(passes=(FOLD,), context=Context()).run(program)


@pytest.mark.parametrize("name", PAIRS)
def test_the_function_stays_and_the_batch_norm_goes(name: str) -> None:
    layers, shape = PAIRS[name]
    model = nn.Sequential(*copy.deepcopy(layers), nn.ReLU()).eval().double()
    with_statistics(model)
    x = torch.randn(shape, dtype=torch.float64)
    dense = copy.deepcopy(model)
    program, plan = folded(model, x)
    assert [record.target for record in plan.changes] == ["1"]
    assert type(model[1]) is nn.Identity
    assert model[0].bias is not None
    assert [node.target for node in program.graph.nodes if node.op == "call_module"] == ["0", "2"]
    bound = rounding_bound(program)
    other = torch.randn(shape[0] + 1, *shape[1:], dtype=torch.float64)
    for value in (x, other):
        assert relative_error(program(value), dense(value)) <= bound
        assert relative_error(model(value), dense(value)) <= bound
    assert FOLD.propose(program, Context()).candidates == ()


@pytest.mark.parametrize("name", PAIRS)
def test_undoing_gives_an_ordinary_model_of_the_same_function(name: str) -> None:
    layers, shape = PAIRS[name]
    model = nn.Sequential(*copy.deepcopy(layers)).eval()
    with_statistics(model)
    keys = {key: value.shape for key, value in model.state_dict().items()}
    x = torch.randn(shape)
    _, plan = folded(model, x)
    with torch.no_grad():
        expected = model(x)
        FOLD.restore(model, plan.changes[0].change)
        actual = model(x)
    assert {key: value.shape for key, value in model.state_dict().items()} == keys
    assert type(model[1]) is type(layers[1])
    assert not model[1].training
    # One more rounding, of `1 * y + 0` or of a bias added after the sum.
    assert relative_error(actual, expected) <= 4 * torch.finfo(x.dtype).eps


def test_a_real_architecture_loses_all_of_them() -> None:
    case = find_case("resnet")
    model = with_statistics(case.build()).eval()
    with torch.no_grad():
        expected = model(**case.inputs(3, 0)).logits  # type: ignore[arg-type]
        program, plan = folded(model, case.inputs(2, 0))
        actual = model(**case.inputs(3, 0)).logits  # type: ignore[arg-type]
    assert plan.misses == ()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert relative_error(actual, expected) <= rounding_bound(program)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(observe(program, training=False, gradients=True).gradients) == names


def test_a_plan_is_replayed_on_meta_parameters() -> None:
    case = find_case("resnet")
    model = with_statistics(case.build()).eval()
    _, plan = folded(model, case.inputs(2, 0))
    blank = case.build().eval().to("meta")
    inputs = {name: value.to("meta") for name, value in dict(case.inputs(2, 0)).items()}
    program = capture(blank, inputs)
    apply_plan(program, plan)
    refresh(program)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in blank.state_dict().items()} == shapes


class Reused(nn.Module):
    """Has one flaw, by name, that forbids folding."""

    def __init__(self, flaw: str) -> None:
        super().__init__()
        self.flaw = flaw
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4, track_running_stats=flaw != "untracked")
        self.other = nn.Conv1d(4, 4, 3, padding=1)
        if flaw == "tied":
            self.other.weight = self.conv.weight
        if flaw == "hooked":
            self.norm.register_forward_hook(lambda module, args, output: None)
        if flaw == "parametrized":
            nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.flaw == "twice":
            y = self.conv(torch.relu(y))
        if self.flaw == "activation":
            y = torch.relu(y)
        z: Tensor = self.norm(y)
        if self.flaw == "branch":
            z = z + y
        if self.flaw == "read":
            z = z * self.conv.weight.sum()
        other: Tensor = self.other(x)
        return z + other


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ("branch", "the output of conv is also read by add"),
        ("activation", "its input relu is not the output of a convolution or linear layer"),
        ("twice", "conv is called 2 times"),
        ("read", "the parameters of conv are also read outside of it"),
        ("untracked", "it tracks no running statistics, so it normalises by each batch"),
        ("tied", "conv.weight is tied to other.weight"),
        ("hooked", "norm has hooks, which expect the module as it is"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(flaw: str, reason: str) -> None:
    program = capture(Reused(flaw).eval(), torch.randn(3, 4, 8))
    proposal = FOLD.propose(program, Context())
    assert proposal.candidates == ()
    assert [(miss.target, miss.reason) for miss in proposal.misses] == [("norm", reason)]


def test_a_computed_weight_is_not_folded() -> None:
    program = capture(Reused("parametrized").eval(), torch.randn(3, 4, 8))
    assert FOLD.propose(program, Context()).candidates == ()


def test_another_axis_than_the_outputs_is_not_folded() -> None:
    program = capture(
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)).eval(), torch.randn(3, 5, 4)
    )
    (miss,) = FOLD.propose(program, Context()).misses
    assert miss.reason == "it normalises another axis than the outputs of 0"


def test_training_and_ignored_names_keep_theirs() -> None:
    program = capture(Reused("").eval(), torch.randn(3, 4, 8))
    assert FOLD.propose(program, Context()).candidates != ()
    (miss,) = FOLD.propose(program, Context(training=True)).misses
    assert miss.reason == "training needs its batch statistics"
    for pattern in ("norm", "re:^conv"):
        (miss,) = FOLD.propose(program, Context(ignore=(pattern,))).misses
        assert miss.reason == f"ignored by the pattern {pattern!r}"


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ({"layer": "missing"}, "has no module 'missing'"),
        ({"layer": "other"}, "norm does not follow other"),
        ({"layer": ""}, "does not fit the fold"),
        ({"layer": 3}, "layer: Input should be a valid string"),
        ({"features": 5}, "does not fit the fold"),
        ({"kind": "Linear"}, "does not fit the fold"),
        ({"had_bias": False}, "does not fit the fold"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(details: dict[str, Any], text: str) -> None:
    program = capture(Reused("").eval(), torch.randn(3, 4, 8))
    (candidate,) = FOLD.propose(program, Context()).candidates
    change = candidate.change
    wrong = replace(change, details={**change.details, **details})
    with pytest.raises(PlanError, match=text):
        FOLD.apply(program, wrong)
    with pytest.raises(PlanError, match="it is ReLU"):
        apply_to_another_model(change)


def apply_to_another_model(change: Change) -> None:
    model = Reused("")
    replace_module(model, "norm", nn.ReLU())
    FOLD.apply(capture(model.eval(), torch.randn(3, 4, 8)), change)
