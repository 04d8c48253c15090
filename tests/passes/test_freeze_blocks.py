"""`freeze-blocks` ends the backward pass where nothing below is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo import EXAMPLE, find_case, without_dropout

import graphopt
from graphopt.capture import capture
from graphopt.passes.base import Context
from graphopt.passes.errors import ConfigError
from graphopt.passes.gates.freeze_blocks import FreezeBlocks
from graphopt.passes.rewriting import make_change
from graphopt.passes.snapshot import Snapshot
from graphopt.recipes import load_recipe
from graphopt.training import ExecutedFlops


def bert() -> tuple[nn.Module, dict[str, Any]]:
    case = find_case("bert-classifier")
    return without_dropout(case.build()), case.call(*EXAMPLE)[1]


class Tied(nn.Module):
    """Two blocks on words; two modules below them share one table."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.again = nn.Embedding(9, 8), nn.Embedding(9, 8)
        self.again.weight = self.words.weight
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in "ab")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.words(ids) + self.again(ids.flip(1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden


def misses(model: nn.Module, call: Any, **options: Any) -> list[str]:
    proposal = FreezeBlocks(**options).propose(capture(model, call), Context())
    assert not proposal.candidates
    return [miss.reason for miss in proposal.misses]


def test_nothing_below_the_depth_is_trained_and_all_above_is() -> None:
    model, call = bert()
    frozen = graphopt.optimize(model, call, recipe="freeze-blocks{depth=1}")
    kinds = {name: p.requires_grad for name, p in frozen.named_parameters()}
    below = {n for n in kinds if "embeddings" in n or "layer.0." in n}
    assert below
    assert {name for name, trained in kinds.items() if not trained} == below
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_backward_pass_of_the_frozen_part_is_saved() -> None:
    model, call = bert()
    frozen = graphopt.optimize(model, call, recipe="freeze-blocks{depth=1}")
    assert torch.equal(frozen.eval()(**call).logits, model.eval()(**call).logits)
    spent = []
    for item in (model, frozen):
        with ExecutedFlops() as executed:
            item.train()(**call).logits.sum().backward()
        spent.append(executed.flops)
    # One of two equal layers saves its backward pass, two of three parts; of the other one, at
    # most the gradients of its inputs, one of three. Heads cost little.
    assert 1 - (1 / 2) * (2 / 3) - (1 / 2) * (1 / 3) < spent[1] / spent[0] < 1 - (1 / 2) * (2 / 3)


def test_a_freeze_that_is_rolled_back_leaves_everything_trained() -> None:
    model, call = bert()
    current = capture(model, call)
    step = FreezeBlocks(depth=1)
    (candidate,) = step.propose(current, Context()).candidates
    snapshot = Snapshot(current)
    make_change(step, current, candidate, Context())
    assert not all(parameter.requires_grad for parameter in model.parameters())
    snapshot.restore()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_parameter_of_the_frozen_part_stays_tied() -> None:
    torch.manual_seed(0)
    model = Tied()
    call = (torch.randint(0, 9, (2, 5)),)
    frozen = graphopt.optimize(model, call, recipe="freeze-blocks{depth=1}")
    first, second = (frozen.get_submodule(name).weight for name in ("words", "again"))
    assert first is second
    assert not first.requires_grad


def test_a_dry_run_of_fine_tune_plans_what_a_run_does_and_freezes_nothing() -> None:
    case = find_case("bert-classifier")
    model, call = case.build(), case.call(*EXAMPLE)[1]
    call["attention_mask"][0, 5:] = 0
    recipe = "freeze-blocks{depth=1},hoist-frozen-prefix,drop-dead-tokens,pack-tokens"
    planned = graphopt.plan(model, call, recipe=recipe)
    assert all(parameter.requires_grad for parameter in model.parameters())
    done = graphopt.report(graphopt.optimize(model, call, recipe=recipe, measure=False))
    kept = [(row.pass_name, row.reason) for row in done.rows if row.decision == "kept"]
    assert [(change.pass_name, change.summary) for change in planned.changes] == kept
    assert [name for name, _ in kept] == [spec.name for spec in load_recipe("fine-tune").passes]
    assert done.totals is not None
    assert planned.totals is not None
    # What a change saves is rounded to whole operations.
    assert abs(planned.totals.after.flops - done.totals.after.flops) <= len(kept)


def test_a_word_table_that_is_also_the_head_is_not_frozen() -> None:
    case = find_case("gpt2")
    args, kwargs = case.call(*EXAMPLE)
    (reason,) = misses(case.build(), kwargs or args, depth=1)
    assert "is also read above" in reason


def test_what_cannot_be_frozen_says_why() -> None:
    model, call = bert()
    assert "cannot be frozen" in misses(model, call, depth=2)[0]
    assert misses(nn.Linear(4, 4), (torch.randn(2, 4),))[0]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert "frozen already" in misses(model, call)[0]


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.0}, {"depth": -1}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="freeze-blocks takes"):
        FreezeBlocks(**options)
