"""Residual blocks that are removed for good: the least influential ones, and why others stay."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from residual_stack import Stack, X, blocks_of, changed, reasons
from torch.nn import functional
from zoo import EXAMPLE, find_case, without_dropout

import graphopt
from graphopt.capture import capture
from graphopt.passes.base import Context
from graphopt.passes.calibration import Calibration
from graphopt.passes.errors import PlanError
from graphopt.passes.gates.gate_layers import GateLayers
from graphopt.testing import assert_pass_contract


def weakened(*blocks: int) -> Stack:
    """Return a model in which some blocks hardly matter."""
    model = Stack()
    with torch.no_grad():
        for index, block in enumerate(blocks_of(model)):
            block.down.weight.mul_(0.01 if index in blocks else 3.0)
            block.down.bias.mul_(0.01 if index in blocks else 3.0)
    return model


def test_the_least_influential_blocks_are_removed() -> None:
    step = GateLayers(remove=2)
    program, plan = changed(weakened(1, 3), (X,), step, Context())
    assert {record.change.target for record in plan.changes} == {"blocks.1", "blocks.3"}
    model = weakened(1, 3)
    remaining = model.head(model.blocks[2](model.blocks[0](X)))
    assert torch.equal(program.run(X)[0], remaining)
    assert not [name for name, _ in program.model.named_parameters() if ".1." in name]
    assert plan.totals is not None
    share = plan.totals.after.parameters / plan.totals.before.parameters
    assert share == pytest.approx((2 * 288 + 27) / (4 * 288 + 27), abs=0.02)


def test_influence_is_one_minus_the_cosine_on_calibration_data() -> None:
    model = Stack()
    with torch.no_grad():  # Block 2 looks at the first feature only.
        blocks_of(model)[2].up.weight[:, 1:] = 0
    data = [{"x": torch.randn(3, 5, 8)} for _ in range(3)]
    context = Context(calibration=Calibration(data))
    proposal = GateLayers(remove=4).propose(capture(model, (X,)), context)
    h = torch.cat([batch["x"] for batch in data])
    wanted = {}
    for index, block in enumerate(blocks_of(model)):
        after = block(h)
        wanted[f"blocks.{index}"] = 1 - functional.cosine_similarity(h, after, -1).mean().item()
        h = after
    found = {
        candidate.change.target: float(candidate.change.summary.rpartition(" ")[2])
        for candidate in proposal.candidates
    }
    assert found == pytest.approx(wanted, rel=6e-3)
    assert list(found.values()) == sorted(found.values())


def test_padding_has_no_influence() -> None:
    case = find_case("bert-classifier")
    _, kwargs = case.call(*EXAMPLE)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[:, 5:] = 0
    program = capture(case.build(), {**kwargs, "attention_mask": mask})

    def summaries(padding: int) -> list[str]:
        ids = kwargs["input_ids"].masked_fill(mask == 0, padding)
        program.example = {**program.example, "input_ids": ids}
        proposal = GateLayers(remove=9).propose(program, Context())
        return [candidate.change.summary for candidate in proposal.candidates]

    assert len(summaries(1)) == 4
    assert summaries(1) == summaries(2)


def test_removal_keeps_the_contract() -> None:
    case = find_case("bert-classifier")
    args, kwargs = case.call(*EXAMPLE)
    assert_pass_contract(
        GateLayers(remove=1),
        lambda: without_dropout(case.build()),
        kwargs or args,
        context=Context(budget=0.5, training=True),
        other_example=case.call(*EXAMPLE, labels=True)[1],
    )


def test_a_removed_block_is_refused_eagerly_saved_and_given_back(tmp_path: Path) -> None:
    model = graphopt.optimize(weakened(2), (X,), recipe=[GateLayers(remove=1)]).eval()
    with pytest.raises(PlanError, match="the original forward fails over the rewritten modules"):
        model(X[0])
    graphopt.save(model, tmp_path / "out")
    loaded = graphopt.load(tmp_path / "out", base=Stack()).eval()
    assert torch.equal(loaded(X), model(X))
    assert "blocks.2.up.weight" not in loaded.state_dict()
    dense = graphopt.densify(copy.deepcopy(model))
    assert dense.state_dict().keys() == Stack().state_dict().keys()
    assert torch.equal(dense(X), model(X))
    assert not dense.state_dict()["blocks.2.up.weight"].any()


def test_shared_parameters_are_not_removed() -> None:
    model = Stack()
    model.blocks[2] = model.blocks[1]
    tied = Stack()
    blocks_of(tied)[2].up.weight = blocks_of(tied)[1].up.weight
    for shared in (model, tied):
        proposal = GateLayers(remove=4).propose(capture(shared, (X,)), Context())
        targets = {candidate.change.target for candidate in proposal.candidates}
        assert targets == {"blocks.0", "blocks.3"}
        assert any("also read outside" in miss.reason for miss in proposal.misses)


def test_parameters_with_a_second_name_are_not_removed() -> None:
    model = Stack(2)
    model.other = blocks_of(model)[1].up
    found = reasons(model, (X,), GateLayers(remove=2), Context())
    assert found == ["other.bias is tied to blocks.1.up.bias"]


def test_the_meta_device_has_no_influences() -> None:
    with torch.device("meta"):
        model = Stack()
    found = reasons(model, (X.to("meta"),), GateLayers(remove=1), Context())
    assert all("parameters on the meta device have no values" in reason for reason in found)
