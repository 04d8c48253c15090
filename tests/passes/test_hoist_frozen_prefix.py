"""What is split off as frozen: by dataflow, in evaluation mode, one row per sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from zoo import EXAMPLE, find_case

from graphopt.capture import capture
from graphopt.passes.base import Context
from graphopt.passes.exact.hoist_frozen_prefix import HoistFrozenPrefix, frozen_names
from graphopt.passes.frozen_prefix import frozen_prefix
from graphopt.passes.manager import PassManager
from graphopt.passes.program import Program
from graphopt.testing import assert_same_outputs

FROZEN: dict[str, tuple[str, ...]] = {
    "bert-classifier": ("embeddings", "layer.0."),
    "gpt2": ("wte", "wpe", "r.drop.", "h.0."),
    "cnn": ("stem", "expand"),
    "t5": ("encoder", "shared"),
}


def frozen(model: nn.Module, parts: Iterable[str]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))
    return model


def program_of(name: str, parts: Iterable[str]) -> Program:
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE, labels=case.labels is not None)
    return capture(frozen(case.build(), parts), kwargs or args)


def reason_of(program: Program, **context: Any) -> str:
    proposal = HoistFrozenPrefix().propose(program, Context(training=True, **context))
    assert not proposal.candidates
    return "; ".join(miss.reason for miss in proposal.misses)


@pytest.mark.parametrize("name", FROZEN)
def test_the_frozen_part_no_longer_follows_the_mode(name: str) -> None:
    program = program_of(name, FROZEN[name])
    plan = PassManager(passes=(HoistFrozenPrefix(),), context=Context(training=True)).run(program)
    assert [record.pass_name for record in plan.changes] == ["hoist-frozen-prefix"]
    prefix = frozen_prefix(program, frozen_names(program, plan.changes[0].change))
    assert prefix.values
    assert prefix.flops > 0

    # As if the modules of the frozen part were in evaluation mode: the same random numbers too.
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE, labels=case.labels is not None)
    reference = frozen(case.build(), FROZEN[name]).train()
    for part, module in reference.named_modules():
        if any(word in f"{part}." for word in FROZEN[name]):
            module.eval()
    program.model.train()
    torch.manual_seed(1)
    expected = reference(*args, **kwargs)
    torch.manual_seed(1)
    assert_same_outputs(program(*args, **kwargs), expected)


def test_only_frozen_modules_lose_their_dropout() -> None:
    program = program_of("bert-classifier", FROZEN["bert-classifier"])
    PassManager(passes=(HoistFrozenPrefix(),), context=Context(training=True)).run(program)
    dropouts = {str(node.target) for node, _ in program.leaf_calls(nn.Dropout)}
    assert "bert.embeddings.dropout" not in dropouts
    assert "bert.encoder.layer.0.output.dropout" not in dropouts
    assert "bert.encoder.layer.1.output.dropout" in dropouts


def test_a_value_that_costs_little_is_not_kept() -> None:
    program = program_of("llama", ("embed_tokens", "layers.0."))
    names = [name for name, p in program.model.named_parameters() if not p.requires_grad]
    values = frozen_prefix(program, names).values
    tables = [node for node in values if node.meta["val"].shape[0] == 1]
    assert not tables, "rotary tables belong to no sample"


def test_it_says_why_nothing_is_split_off() -> None:
    assert "no parameter is frozen" in reason_of(program_of("bert-classifier", ()))
    assert "every parameter is frozen" in reason_of(program_of("bert-classifier", ("",)))
    lookups = program_of("bert-classifier", ("embeddings",))
    assert "no result of the frozen part" in reason_of(lookups)
    late = program_of("bert-classifier", ("layer.1.",))
    assert "no result of the frozen part" in reason_of(late)
    ignored = program_of("bert-classifier", FROZEN["bert-classifier"])
    assert "ignored by the pattern 'bert'" in reason_of(ignored, ignore=("bert",))


class BatchMean(nn.Module):
    """A frozen layer whose result is relative to the batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.head = nn.Linear(32, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(features)
        result: torch.Tensor = self.head(hidden - hidden.mean(0))
        return result


def test_a_value_that_depends_on_other_samples_is_refused() -> None:
    program = capture(BatchMean(), (torch.randn(4, 32),))
    assert "depends on other samples" in reason_of(program)
